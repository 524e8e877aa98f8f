"""Goldens of the LlamaGen generators: the training pass, whole sampling runs; and of its tokenizer.

The checks of the generators serve NAR as well, whose goldens hold tensors of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_checks import llamagen_vq
from tests.golden_checks.case import ATOL, Check, Comparison, GoldenCase
from vistok.decoding.guidance import ConstantGuidance, GuidanceSchedule, StepsGuidance, apply_guidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.streams import ImageStreams
from vistok.models import upstream
from vistok.models.generators.base import Condition, join_conditions
from vistok.models.generators.llamagen import GridTransformer
from vistok.models.generators.text_features import TextFeatures

BRANCH_ATOL = 1e-5  # of one branch; guidance adds up to 2 * scale - 1 times as much
GREEDY = SamplingParams(top_k=1)
RUNS = {  # name -> what differs from the configuration
    "greedy_cfg": {"cfg_interval": -1},
    "greedy_cfg_interval": {},
    "greedy_nocfg": {"cfg_scale": 1.0, "cfg_interval": -1},
}


@torch.inference_mode()
def check_class(case: GoldenCase) -> Comparison:
    """A class-conditional generator."""
    model = load(case)
    comparison = Comparison()
    check_training(case, comparison, model, case.inputs["train_labels"])
    check_runs(case, comparison, model, case.inputs.get("gen_labels", case.inputs["train_labels"]))
    return comparison


@torch.inference_mode()
def check_text(case: GoldenCase) -> Comparison:
    """A text-conditional generator."""
    model = load(case)
    texts = TextFeatures(case.inputs["caption_embs"], case.inputs["caption_mask"].bool())
    padded = texts.left_padded(case.config["cls_token_num"])
    comparison = Comparison()
    compare(case, comparison, "intermediate/caption_embs_left_padded", padded.features)
    compare(case, comparison, "intermediate/caption_mask_left_padded", padded.keep.long())
    mask = raster_mask(model, padded.keep)
    compare(case, comparison, "intermediate/train_attention_mask", mask.to(torch.uint8))
    check_training(case, comparison, model, texts)
    check_runs(case, comparison, model, texts)
    return comparison


def load(case: GoldenCase) -> GridTransformer:
    """The model of a golden."""
    model = upstream.load(case.system, case.weights, case.config)
    assert isinstance(model, GridTransformer)
    return model


def check_training(
    case: GoldenCase, comparison: Comparison, model: GridTransformer, condition: Condition
) -> None:
    """Logits, loss and the features after the first block."""
    indices, hidden = case.inputs["token_ids"], []
    hook = model.blocks[0].register_forward_hook(lambda block, inputs, output: hidden.append(output))
    logits = model(condition, indices)
    hook.remove()
    order = raster_slots(model)
    after_first = hidden[0][:, order[order < hidden[0].shape[1]]]
    compare(case, comparison, "intermediate/train_hidden_after_layer0", after_first)
    compare(case, comparison, "outputs/train_logits", logits)
    losses = F.cross_entropy(logits.transpose(1, 2), indices, reduction="none")  # [b n]
    valid = case.inputs.get("valid", torch.ones(len(indices)))[:, None].expand_as(losses)
    loss = (losses * valid).sum() / valid.sum().clamp(min=1)
    compare(case, comparison, "outputs/train_loss", loss.reshape(1))


def check_runs(
    case: GoldenCase, comparison: Comparison, model: GridTransformer, condition: Condition
) -> None:
    """Greedy generation with our loop, and the recorded draws of torch.multinomial."""
    for run, changes in RUNS.items():
        if (
            f"{run}_ids" not in case.outputs
        ):  # the release cannot generate with fewer heads of keys than of queries
            continue
        settings = upstream.sampling_settings(case.system, case.config | changes)
        indices, logits = greedy(model, condition, guidance_of(model, settings))
        compare(case, comparison, f"outputs/{run}_ids", indices)
        atol = guided_atol(settings["guidance_scale"])
        compare(case, comparison, f"outputs/{run}_step_logits", logits, atol)
        check_branches(case, comparison, model, condition, run, indices)
        if settings["guidance_scale"] == 1.0:
            trained = model(condition, indices)[:, model.order.sequence()]
            comparison.compare(f"{run}: steps and training pass agree", logits, trained)
    if "sampled_ids" not in case.outputs:
        return
    indices, logits, probabilities = draw_recorded(case, model, condition)
    atol = guided_atol(case.config["cfg_scale"])
    compare(case, comparison, "outputs/sampled_ids", indices)
    compare(case, comparison, "outputs/sampled_step_logits", logits, atol)
    compare(case, comparison, "outputs/sampled_probs", probabilities)


def greedy(model: GridTransformer, condition: Condition, guidance: GuidanceSchedule) -> tuple[Tensor, Tensor]:
    """Tokens `[b n]`, and the guided logits `[b n v]` in the order of the steps."""
    logits: list[Tensor] = []

    def record(step_logits: Tensor) -> Tensor:
        logits.append(step_logits)
        return step_logits

    tokens = generate_ordered(
        model,
        condition,
        streams=ImageStreams.from_seeds(range(len(condition))),
        sampling=GREEDY,
        guidance=guidance,
        logits_processor=record,
    )
    return tokens.data, torch.cat(logits, dim=1)


def check_branches(
    case: GoldenCase,
    comparison: Comparison,
    model: GridTransformer,
    condition: Condition,
    run: str,
    indices: Tensor,
) -> None:
    """The logits of both branches, with our tokens as the history."""
    name = f"intermediate/{run}_model_logits"
    if name not in case.expected:
        return
    rows = join_conditions(condition, model.null_condition_for(condition))
    indices, cache = indices.repeat(2, 1), model.new_cache(len(rows))
    steps = [model.prefill(rows, cache)]
    steps += [model.step(indices[:, positions], cache) for positions in model.order.plan()[:-1]]
    comparison.compare(name, torch.cat(steps, dim=1), case.expected[name])


def draw_recorded(
    case: GoldenCase, model: GridTransformer, condition: Condition
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[b n]`, and guided logits and probabilities `[b n v]` in the order of the steps.

    The release draws every position with one call of torch.multinomial and the global generator.
    """
    settings = upstream.sampling_settings(case.system, case.config | {"cfg_interval": -1})
    top_k = settings["top_k"] and min(settings["top_k"], model.codebook_size)
    params = SamplingParams(settings["temperature"], top_k, settings["top_p"])
    scale, is_guided = settings["guidance_scale"], settings["guidance_scale"] != 1.0
    rows = join_conditions(condition, model.null_condition_for(condition)) if is_guided else condition
    indices = torch.zeros(len(condition), model.num_tokens, dtype=torch.int64)
    cache, plan = model.new_cache(len(rows)), model.order.plan()
    steps, drawn = [], []
    torch.manual_seed(case.config["sample_seed"])
    logits = model.prefill(rows, cache)
    for step, positions in enumerate(plan):
        steps.append(apply_guidance(*logits.chunk(2), scale) if is_guided else logits)
        drawn.append(token_probabilities(steps[-1], params))  # [b k v]
        for k, position in enumerate(positions):
            indices[:, position] = torch.multinomial(drawn[-1][:, k], 1)[:, 0]
        if step + 1 < len(plan):
            decided = indices[:, positions]
            logits = model.step(decided.repeat(2, 1) if is_guided else decided, cache)
    return indices, torch.cat(steps, dim=1), torch.cat(drawn, dim=1)


def guidance_of(model: GridTransformer, settings: Mapping[str, Any]) -> GuidanceSchedule:
    """The schedule that the settings of a pipeline stand for."""
    scale, tokens = settings["guidance_scale"], settings["guidance_tokens"]
    if tokens is None:
        return ConstantGuidance(scale)
    return StepsGuidance(scale, model.order.num_steps_within(tokens))


def raster_slots(model: GridTransformer) -> Tensor:
    """Where the condition and the tokens, in raster order, lie in a sequence `[t+n]`."""
    length = model.prefix.length
    return torch.cat([torch.arange(length), length + model.order.slots()])


def raster_mask(model: GridTransformer, keep: Tensor | None) -> Tensor:
    """The whole training mask in raster order, `[b t+n t+n]`."""
    slots = raster_slots(model)
    dense = model.mask(keep, len(slots)).dense(len(slots), len(slots), slots.device)
    return dense[:, 0, slots][:, :, slots]


def guided_atol(scale: float) -> float:
    """How far guided logits may be off."""
    return max(ATOL, BRANCH_ATOL * (2 * scale - 1))


def compare(case: GoldenCase, comparison: Comparison, name: str, actual: Tensor, atol: float = ATOL) -> None:
    """Compare what the golden recorded under `name`, if it did."""
    if name in case.expected:
        comparison.compare(name, actual, case.expected[name], atol)


CHECKS: dict[str, Check] = {"c2i": check_class, "t2i": check_text, "vq": llamagen_vq.check}
