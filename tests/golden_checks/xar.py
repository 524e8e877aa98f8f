"""Goldens of xAR: the training pass, and whole sampling runs with recorded noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.flow_sampling import SharedModulations, generate_flow
from vistok.decoding.guidance import RampGuidance
from vistok.models import upstream
from vistok.models.generators.xar import XAR, Modulations, noisy_context_loss
from vistok.models.heads.flow import Euler, EulerMaruyama, FlowHead, logit_normal_times
from vistok.models.layers.kv_cache import KVCache
from vistok.training.masked import drop_labels

EVERY = 37  # the golden keeps every 37th token of some features
CALL = re.compile(r"sde_cell(?P<cell>\d+)_call(?P<call>\d+|last)_(?P<piece>input|label|time|velocity)")


class RecordedNormals:
    """Stands in for `ImageStreams`: the recorded draws in the order in which they were made."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = list(draws)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        draw = self.draws.pop(0)
        if draw.shape[1:] != shape:
            raise ValueError(f"the sampler asks for draws {list(shape)}, {list(draw.shape[1:])} come next")
        return draw.to(dtype)


@dataclass(frozen=True)
class Call:
    """One evaluation of the network while sampling."""

    latents: Tensor
    times: Tensor
    class_labels: Tensor
    velocity: Tensor


@dataclass
class Run:
    """What a sampling run gave."""

    calls: list[list[Call]]  # by cell
    cells: list[Tensor] = field(default_factory=list)  # [b k c] each, scaled
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # [b c h w], scaled


def check(case: GoldenCase) -> Comparison:
    """Everything that an xAR golden records."""
    model = upstream.load("xar", case.weights, case.config)
    assert isinstance(model, XAR)
    comparison = Comparison()
    with torch.no_grad():
        _check_training(case, model, comparison)
        _check_sampling(case, model, comparison)
    return comparison


def _check_training(case: GoldenCase, model: XAR, comparison: Comparison) -> None:
    inputs, sequence = case.inputs, model.order.sequence()
    latents = rearrange(inputs["train_latents"], "b c h w -> b (h w) c")
    times = rearrange(logit_normal_times(inputs["train_time_normals"]), "(k b) -> b k", b=len(latents))
    noise = rearrange(inputs["train_noises"], "k b n c -> b (k n) c")[:, model.order.slots()]
    labels = drop_labels(
        inputs["train_labels"],
        inputs["train_label_uniforms"],
        model.null_label,
        case.config["label_drop_prob"],
    )
    features: dict[str, Tensor] = {}
    for name, part in {"encoder_block0": model.encoder.blocks[0], "encoder": model.encoder}.items():
        part.register_forward_hook(lambda module, args, output, name=name: features.update({name: output}))
    noisy = model.head.noised(latents, noise, times[:, model.order.decided_at()])
    velocity = model(noisy, times, labels)
    loss = noisy_context_loss(model.train(), latents / model.latent_scale, labels, times, noise)
    model.eval()
    time_int = rearrange((times * 1000).long(), "b k -> (k b) 1 1")
    found = {
        "outputs/train_velocity": velocity[:, sequence],
        "outputs/train_loss": loss,
        "intermediate/train_time_int": time_int,
        "intermediate/train_encoder_block0_out": features["encoder_block0"][:1, ::EVERY],
        "intermediate/train_encoder_out": features["encoder"][:1, ::EVERY],
    }
    _compare(comparison, case, found)


def _check_sampling(case: GoldenCase, model: XAR, comparison: Comparison) -> None:
    config = case.config
    stochastic = _run(case, model, FlowHead(EulerMaruyama()), config["sde_num_steps"], config["sde_cfg"])
    euler = _run(case, model, FlowHead(Euler()), config["euler_num_steps"], config["euler_cfg"])
    unguided = _run(case, model, FlowHead(Euler()), config["euler_num_steps"], 1.0)
    found = {
        "outputs/sde_tokens": stochastic.tokens,
        "outputs/sde_cells": torch.stack(stochastic.cells),
        "outputs/euler_tokens": euler.tokens,
        "outputs/euler_tokens_cfg1": unguided.tokens,
        "intermediate/sde_time_int": _integer_times(stochastic),
        "intermediate/euler_time_int": _integer_times(euler),
        **_recorded_calls(case, model, stochastic),
    }
    _compare(comparison, case, found)


def _compare(comparison: Comparison, case: GoldenCase, found: dict[str, Tensor]) -> None:
    """What the golden recorded of it; the checker names what it recorded besides."""
    for name in found.keys() & case.expected.keys():
        comparison.compare(name, found[name], case.expected[name])


def _run(case: GoldenCase, model: XAR, head: FlowHead, num_steps: int, scale: float) -> Run:
    """One sampling run with the recorded noise, while the network is watched."""
    run = Run(calls=[[] for _ in range(model.order.num_steps)])
    plan = model.order.plan()
    velocity, at = model.velocity, SharedModulations.at
    told: list[tuple[Tensor, Tensor]] = []  # times and classes, of the call that comes next

    def asked(modulations: SharedModulations, times: Sequence[float], num_rows: int) -> Modulations:
        labels = modulations.classes[modulations.rows[:num_rows]]
        told.append((torch.tensor(times).expand(num_rows, -1), labels))
        return at(modulations, times, num_rows)

    def watched(latents: Tensor, modulations: Modulations, cache: KVCache) -> Tensor:
        result = velocity(latents, modulations, cache)
        run.calls[len(run.cells)].append(Call(latents, *told.pop(), result))
        return result

    def keep_cell(step: int, latents: Tensor) -> None:
        run.cells.append(latents[:, plan[step]] * model.latent_scale)

    with mock.patch.object(model, "velocity", watched), mock.patch.object(SharedModulations, "at", asked):
        tokens = generate_flow(
            model,
            case.inputs["labels"],
            streams=RecordedNormals(_draws(case, head, num_steps)),
            num_inference_steps=num_steps,
            head=head,
            guidance=RampGuidance(scale),
            on_step=keep_cell,
        )
    grid = model.layout.grid
    assert grid is not None
    run.tokens = rearrange(tokens.data * model.latent_scale, "b (h w) c -> b c h w", h=grid[0])
    return run


def _draws(case: GoldenCase, head: FlowHead, num_steps: int) -> list[Tensor]:
    """Starting noise of every cell, each followed by that of its steps, if they take any."""
    starts, noises = case.inputs["sample_latents"], case.inputs["sample_noises"]
    if isinstance(head.integrator, Euler):
        return list(starts)
    per_cell = noises.split(num_steps - 1)
    return [draw for start, steps in zip(starts, per_cell, strict=True) for draw in (start, *steps)]


def _integer_times(run: Run) -> Tensor:
    """What the network was told in every call, `[cells calls]`."""
    return torch.tensor([[int(call.times[0, -1] * 1000) for call in calls] for calls in run.calls])


def _recorded_calls(case: GoldenCase, model: XAR, run: Run) -> dict[str, Tensor]:
    """Inputs and outputs of those calls that the golden recorded."""
    found = {}
    for name in case.intermediate:
        if match := CALL.fullmatch(name):
            number = -1 if match["call"] == "last" else int(match["call"])
            call = _with_both_branches(model, run.calls[int(match["cell"])][number])
            pieces = {
                "input": call.latents,
                "label": call.class_labels,
                "time": rearrange(call.times.double(), "b s -> (s b)"),
                "velocity": call.velocity,
            }
            found[f"intermediate/{name}"] = pieces[match["piece"]]
    return found


def _with_both_branches(model: XAR, call: Call) -> Call:
    """The release evaluates the unconditional branch in the first cell, too, and does not use it; we leave it out."""
    if (call.class_labels == model.null_label).any():
        return call
    labels = torch.cat([call.class_labels, torch.full_like(call.class_labels, model.null_label)])
    latents, times = call.latents.repeat(2, 1, 1), call.times.repeat(2, 1)
    velocity = model.velocity(latents, model.modulate(times, labels), model.new_cache(len(labels)))
    return Call(latents, times, labels, velocity)


CHECKS: dict[str, Check] = {"generator": check}
