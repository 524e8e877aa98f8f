"""Goldens of LANTERN's drafter network: forward passes with a cache and with a tree, and its losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_checks.case import Check, Comparison, GoldenCase
from vistok.decoding.guidance import apply_guidance
from vistok.kernels.attention import AttentionMask, CausalMask, TreeMask
from vistok.models import upstream
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.layers.kv_cache import KVCache
from vistok.training.drafter_loss import align, feature_loss, masked_mean, token_loss


def load(case: GoldenCase) -> EagleDrafter:
    """The drafter of a golden."""
    config = case.config | {"bias": case.config["fc_bias"]}
    network = upstream.load("lantern_drafter", case.weights, config)
    assert isinstance(network, EagleDrafter)
    return network


@torch.inference_mode()
def check_forward(case: GoldenCase) -> Comparison:
    """Prefill, append, one masked tree step; all with the same cache."""
    network, comparison = load(case), Comparison()
    cache = network.new_cache(2)
    length = case.inputs["input_ids"].shape[1]
    found = {"prefill_hidden": _run(network, case, "", torch.arange(length), CausalMask(), cache)}
    more = length + torch.arange(case.inputs["input_ids2"].shape[1])
    found["append_hidden"] = _run(network, case, "2", more, CausalMask(), cache)
    found["append_logits"] = F.linear(found["append_hidden"], case.inputs["head_weight"])
    found["append_last_logits_cfg"] = _guided(case, found["append_logits"][:, -1])
    found["key_cache_layer0"] = cache.layers[0].keys[:, :, : cache.length]
    found["value_cache_layer0"] = cache.layers[0].values[:, :, : cache.length]
    cache.split_rows()
    mask = TreeMask(cache.lengths, case.inputs["tree_mask"].bool().expand(2, -1, -1))
    tree = case.inputs["tree_hidden"], case.inputs["tree_ids"]
    positions = case.inputs["tree_position_ids"].expand(2, -1)
    found["tree_hidden"] = network(tree[0], network.embed_tokens(tree[1]), positions, mask, cache)
    found["tree_logits"] = F.linear(found["tree_hidden"], case.inputs["head_weight"])
    found["tree_logits_cfg"] = _guided(case, found["tree_logits"])
    for name, actual in found.items():
        comparison.compare(f"outputs/{name}", actual, case.outputs[name])
    return comparison


def _run(
    network: EagleDrafter, case: GoldenCase, part: str, positions: Tensor, mask: AttentionMask, cache: KVCache
) -> Tensor:
    features, ids = case.inputs[f"hidden_states{part}"], case.inputs[f"input_ids{part}"]
    return network(features, network.embed_tokens(ids), positions, mask, cache)


def _guided(case: GoldenCase, logits: Tensor) -> Tensor:
    """Conditional and unconditional row -> one."""
    cond, uncond = logits.chunk(2)
    return apply_guidance(cond, uncond, float(case.inputs["cfg_scale"]))


@torch.inference_mode()
def check_losses(case: GoldenCase) -> Comparison:
    """The batch that is made of two samples, and what the network, without noise, loses on it."""
    network, comparison = load(case), Comparison()
    samples = [f"sample_{i}" for i in range(2)]
    features = torch.stack([case.inputs[f"{name}/hidden_state"] for name in samples])
    indices = torch.stack([case.inputs[f"{name}/image_tokens"] for name in samples])
    pairs = align(features, indices, network.prefix_length, supervise_first=False)
    counted = pairs.is_supervised()
    found = {
        # The release adds a last position that never counts.
        "batch/input_ids": F.pad(pairs.tokens, (0, 1)),
        "batch/target": F.pad(pairs.targets, (0, 0, 0, 1)),
        "batch/loss_mask": F.pad(counted.float(), (0, 1)).expand(2, -1),
        "batch/attention_mask": torch.ones(features.shape[:2], dtype=torch.int64),
        "masked_positions": 2 * counted.sum().float().reshape(1),
    }
    positions = torch.arange(pairs.tokens.shape[1])
    predicted = network(pairs.features, network.embed_tokens(pairs.tokens), positions, CausalMask())
    ours, theirs = (F.linear(states, case.inputs["head_weight"]) for states in (predicted, pairs.targets))
    of_features = masked_mean(feature_loss(predicted, pairs.targets), counted)
    of_tokens = masked_mean(token_loss(ours, theirs), counted)
    found["feature_loss"], found["token_loss"] = of_features.reshape(1), of_tokens.reshape(1)
    found["total_loss"] = (of_features + case.config["p_w"] * of_tokens).reshape(1)
    best = ours[:, counted].topk(3).indices == theirs[:, counted].argmax(dim=-1, keepdim=True)
    found["top123_correct"] = best.flatten(0, 1).sum(dim=0).cumsum(dim=0).float()
    found["top1_correct"] = found["top123_correct"][:1]
    for name, actual in found.items():
        comparison.compare(f"outputs/{name}", actual, case.outputs[name])
    return comparison


CHECKS: dict[str, Check] = {"drafter_forward": check_forward, "drafter_train_loss": check_losses}
