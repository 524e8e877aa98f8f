"""Goldens of continuous speculative decoding: a whole run of two models, and stand-alone decisions."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.mar import compare_relative, make_head
from vistok.decoding.guidance import make_guidance
from vistok.decoding.mar_sampling import Backbone
from vistok.decoding.speculative.continuous import (
    MAX_TRIALS,
    AcceptRule,
    Draws,
    SpeculationParams,
    Verification,
    decide,
    generate_speculative,
)
from vistok.models import upstream
from vistok.models.generators.mar import MAR
from vistok.models.heads.diffusion import Trajectory

PREFILL, DRAFT, VERIFY = 0, 1, 2


class RecordedRun:
    """Stands in for `ImageStreams`: the noise of the run, and the draws of each verification.

    The release numbers the tokens of a block by their position, we in the order in which they were drafted;
    it recorded no trials after the last one it made.

    Args:
        case: the golden.
        calls: what the network was asked so far; the last call is that of the verification.
    """

    def __init__(self, case: GoldenCase, calls: list[tuple[int, Tensor]]) -> None:
        self.inputs = case.inputs
        self.calls = calls

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if shape == self.inputs["noise"].shape[1:]:
            return self.inputs["noise"]
        if shape == self.inputs["inter_noise"].shape[1:]:
            return self.inputs["inter_noise"]
        return self._trials("normal", 0.0)

    def uniform(self, *shape: int) -> Tensor:
        if len(shape) == 2:
            return self._trials("uniform", 1.0)
        return self._drafted_order(self.inputs[f"{self._name()}_uniform"])

    def _name(self) -> str:
        return f"verify{sum(kind == VERIFY for kind, _ in self.calls) - 1}"

    def _trials(self, what: str, padding: float) -> Tensor:
        """`[b t k ...]`."""
        trials = []
        while (name := f"{self._name()}_trial{len(trials):02}_{what}") in self.inputs:
            trials.append(self._drafted_order(self.inputs[name]))
        rest = [torch.full_like(trials[0], padding)] * (MAX_TRIALS - len(trials))
        return torch.stack([*trials, *rest], dim=1)

    def _drafted_order(self, rows: Tensor) -> Tensor:
        """`[(b k) ...]` by position -> `[b k ...]`."""
        positions = self.calls[-1][1]
        ranks = positions.argsort(dim=1).argsort(dim=1)
        rows = rows.unflatten(0, positions.shape)
        return torch.stack([image[order] for image, order in zip(rows, ranks, strict=True)])


def check(case: GoldenCase) -> Comparison:
    """Everything that the golden records."""
    comparison = Comparison()
    with torch.no_grad():
        _check_run(case, comparison)
        for temperature in (1, 42):
            _check_unit(case, temperature, comparison)
    return comparison


def _load(case: GoldenCase, part: str) -> MAR:
    prefix = f"{part}."
    weights = {
        key.removeprefix(prefix): tensor for key, tensor in case.weights.items() if key.startswith(prefix)
    }
    model = upstream.load("mar", weights, case.config["common"] | case.config[part])
    assert isinstance(model, MAR)
    return model


def _check_run(case: GoldenCase, comparison: Comparison) -> None:
    draft, target = _load(case, "draft"), _load(case, "target")
    run, calls = case.config["run"], []
    verifications: list[Verification] = []
    head, num_inference_steps = make_head(case.config["common"]["num_sampling_steps"], run["temperature"])
    conditions = Backbone.conditions

    def watched(self: Backbone, latents: Tensor, start: int, end: int, **options: Any) -> Tensor:
        kind = (
            DRAFT if self.model is draft else VERIFY if any(kind == DRAFT for kind, _ in calls) else PREFILL
        )
        calls.append((kind, self.sequence[:, start:end]))
        return conditions(self, latents, start, end, **options)

    with mock.patch.object(Backbone, "conditions", watched):
        tokens = generate_speculative(
            draft,
            target,
            case.inputs["labels"],
            streams=RecordedRun(case, calls),
            num_steps=run["num_iter"],
            num_inference_steps=num_inference_steps,
            head=head,
            guidance=make_guidance(run["cfg_schedule"], run["cfg"]),
            orders=case.inputs["orders"],
            speculation=SpeculationParams(run["num_draft"], run["ratio"], run["inner_temperature"]),
            on_verify=verifications.append,
        )
    grid = target.layout.grid
    assert grid is not None
    scaled = rearrange(tokens.data * target.latent_scale, "b (h w) c -> b c h w", h=grid[0])
    found = {
        "outputs/tokens": scaled,
        "intermediate/call_log_kind": torch.tensor([kind for kind, _ in calls]),
    }
    for number, (_, positions) in enumerate(calls):
        rows = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
        places = torch.stack([rows, positions.sort(dim=1).values.flatten()])
        found[f"intermediate/call{number:02}_index"] = places
    for number, one in enumerate(verifications):
        found |= _verification(one, f"intermediate/verify{number}", run["inner_temperature"])
    compare_relative(comparison, case, found)


def _verification(one: Verification, name: str, inner_temperature: float) -> dict[str, Tensor]:
    """By position, as the release numbers the tokens of a block."""
    rule, decision = AcceptRule(inner_temperature), one.decision
    found = {
        "sample": one.draft.mean,
        "ratio": decision.log_ratio.exp(),
        "fixed_term": rule.log_bound(one.draft, one.target).exp(),
        "resampled": decision.resampled.tokens,
        "result": decision.tokens,
    }
    for part, trajectory in (("draft", one.draft), ("target", one.target)):
        found |= {
            f"{part}_mean": trajectory.mean,
            f"{part}_std": trajectory.std,
            f"{part}_log_var": trajectory.log_std_sum,
        }
    order = one.positions.argsort(dim=1)
    by_position = {
        f"{name}_{key}": torch.cat([image[row] for image, row in zip(rows, order, strict=True)]).float()
        for key, rows in found.items()
    }
    return by_position | {f"{name}_num_trials": decision.resampled.num_trials.max()}


def _check_unit(case: GoldenCase, temperature: int, comparison: Comparison) -> None:
    inputs = {key.removeprefix("unit_"): tensor[None] for key, tensor in case.inputs.items()}
    draft, target = (
        Trajectory(inputs[f"{part}_mean"], inputs[f"{part}_std"], inputs[f"{part}_log_var"]) for part in "qp"
    )
    rule, tokens = AcceptRule(temperature), inputs["x"]
    draws = Draws(inputs["uniform"], inputs["proposal_normal"], inputs["trial_uniform"])
    decision = decide(tokens, draft, target, draws, rule)
    proposals = target.mean + target.std * draws.trial_normals[:, 0]
    found = {
        "ratio": decision.log_ratio.exp(),
        "accept": decision.is_accepted,
        "residual_prob": rule.residual_share(proposals, draft, target),
        "fixed_term": rule.log_bound(draft, target).exp(),
        "p_pdf": _density(tokens, target),
        "q_pdf": _density(tokens, draft),
        "result": decision.tokens,
        "num_trials": decision.resampled.num_trials,
    }
    compare_relative(
        comparison, case, {f"outputs/unit_T{temperature}_{key}": value[0] for key, value in found.items()}
    )


def _density(tokens: Tensor, gaussian: Trajectory) -> Tensor:
    """By torch, apart from our own."""
    return torch.distributions.Normal(gaussian.mean, gaussian.std).log_prob(tokens).sum(dim=-1).exp()


CHECKS: dict[str, Check] = {"decode": check}
