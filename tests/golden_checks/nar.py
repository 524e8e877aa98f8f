"""Goldens of the NAR generators: those of LlamaGen, and what the two heads and the diagonals add."""

from __future__ import annotations

import torch

from tests.golden_checks import llamagen
from tests.golden_checks.case import Check, Comparison, GoldenCase
from tests.golden_checks.llamagen import compare, load, raster_mask
from vistok.models.generators.base import Condition
from vistok.models.generators.nar import NAR
from vistok.models.generators.text_features import TextFeatures


@torch.inference_mode()
def check_class(case: GoldenCase) -> Comparison:
    """A class-conditional generator."""
    comparison = llamagen.check_class(case)
    model = load(case)
    compare(case, comparison, "intermediate/proximity_mask", raster_mask(model, None)[0].to(torch.uint8))
    _check_heads(case, comparison, model, case.inputs["train_labels"])
    return comparison


@torch.inference_mode()
def check_text(case: GoldenCase) -> Comparison:
    """A text-conditional generator."""
    comparison = llamagen.check_text(case)
    texts = TextFeatures(case.inputs["caption_embs"], case.inputs["caption_mask"].bool())
    _check_heads(case, comparison, load(case), texts)
    return comparison


def _check_heads(case: GoldenCase, comparison: Comparison, model: NAR, condition: Condition) -> None:
    """Both heads before they are merged, and the order."""
    compare(case, comparison, "outputs/diagonal_order", model.order.sequence())
    right, below = model.head_logits(condition, case.inputs["token_ids"])
    raster = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + model.order.slots()])
    compare(case, comparison, "intermediate/train_head_right_logits", right[:, raster])
    compare(case, comparison, "intermediate/train_head_below_logits", below[:, raster])


CHECKS: dict[str, Check] = {"c2i": check_class, "t2i": check_text}
