"""Goldens of the FlexAR generators: logits, intermediate states, greedy generation with and without guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams
from vistok.models import upstream
from vistok.models.generators.base import Condition
from vistok.models.generators.flex_ar import FlexAR, FlexARClass, FlexARText
from vistok.models.generators.text_features import TextFeatures

GREEDY = SamplingParams(top_k=1)
TRUE_NULL = "_true_null"


@torch.inference_mode()
def check_class(case: GoldenCase) -> Comparison:
    """A class-conditional generator."""
    model = upstream.load("flextok_ar", case.weights, case.config)
    assert isinstance(model, FlexARClass)
    indices, labels = case.inputs["token_ids"], torch.tensor(case.config["classes"])
    null = model.null_condition(len(labels))
    embedded = model.embed_all(labels, indices)
    comparison = Comparison()
    _compare(case, comparison, "intermediate/input_embeddings", embedded)
    _compare(case, comparison, "intermediate/trunk_out", model.trunk(embedded))
    _check_logits(case, comparison, model, labels, null)
    # The official loop overwrites the null label with class 0 after the first token.
    _check_generation(case, comparison, model, labels, null, later_null=torch.zeros_like(labels))
    return comparison


@torch.inference_mode()
def check_text(case: GoldenCase) -> Comparison:
    """A text-conditional generator; the last text is the empty one."""
    model = upstream.load("flextok_ar", case.weights, case.config)
    assert isinstance(model, FlexARText)
    indices = case.inputs["token_ids"]
    texts = TextFeatures(case.inputs["text_embeddings"], case.inputs["text_attention_mask"].bool())
    prompts = TextFeatures(texts.features[:-1], texts.keep[:-1])
    null = TextFeatures(texts.features[-1:], texts.keep[-1:]).repeat_each(len(prompts))
    embedded = model.embed(indices)
    comparison = Comparison()
    _compare(case, comparison, "intermediate/input_embeddings", embedded)
    _compare(case, comparison, "intermediate/projected_text", model.text_proj(prompts.features))
    _compare(case, comparison, "intermediate/trunk_out", model.trunk(embedded, model.read_text(prompts)))
    _check_logits(case, comparison, model, prompts, null)
    _check_generation(case, comparison, model, prompts, null, later_null=None)
    return comparison


def _check_logits(
    case: GoldenCase, comparison: Comparison, model: FlexAR, condition: Condition, null: Condition
) -> None:
    indices = case.inputs["token_ids"]
    comparison.compare("outputs/logits", model(condition, indices), case.outputs["logits"])
    comparison.compare("outputs/logits_null", model(null, indices), case.outputs["logits_null"])
    cache = model.new_cache(len(indices))
    steps = [model.prefill(condition, cache)]
    steps += [model.step(indices[:, i : i + 1], cache) for i in range(indices.shape[1] - 1)]
    comparison.compare("logits with a cache", torch.cat(steps, dim=1), case.outputs["logits"])


def _check_generation(
    case: GoldenCase,
    comparison: Comparison,
    model: FlexAR,
    condition: Condition,
    null: Condition,
    later_null: Tensor | None,
) -> None:
    scales = {name: scale or 1.0 for name, scale in case.config["cfg_factors"]}
    for name, expected in case.outputs.items():
        if not name.startswith("greedy_ids_"):
            continue
        run = name.removeprefix("greedy_ids_")
        tokens = generate_ordered(
            model,
            condition,
            streams=ImageStreams.from_seeds(range(len(condition))),
            num_tokens=expected.shape[1],
            sampling=GREEDY,
            guidance=ConstantGuidance(scales[run.removesuffix(TRUE_NULL)]),
            null_condition=null,
            later_null_condition=None if run.endswith(TRUE_NULL) else later_null,
        )
        comparison.compare(f"outputs/{name}", tokens.data, expected)


def _compare(case: GoldenCase, comparison: Comparison, name: str, actual: Tensor) -> None:
    if name in case.expected:
        comparison.compare(name, actual, case.expected[name])


CHECKS: dict[str, Check] = {"ar_c2i": check_class, "ar_t2i": check_text}
