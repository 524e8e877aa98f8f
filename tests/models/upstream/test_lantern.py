"""Loading what LANTERN published: targets under other names, drafters for LlamaGen and Anole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_checks.case import GoldenCase
from tests.models.test_eagle import GOLDENS
from vistok.kernels.attention import CausalMask
from vistok.models import upstream
from vistok.models.generators.llamagen import LlamaGenText
from vistok.models.upstream.lantern import build_model as build_target
from vistok.models.upstream.lantern_drafter import build_model as build_drafter

ANOLE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 13,
    "input_type": "anole",
}
DRAFTER = ANOLE | {"input_type": "t2i"}


def anole_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (13, 16),
        "fc.weight": (16, 32),
        "fc.bias": (16,),
        "layers.0.input_layernorm.weight": (16,),
        "layers.0.post_attention_layernorm.weight": (16,),
        "layers.0.mlp.gate_proj.weight": (24, 16),
        "layers.0.mlp.up_proj.weight": (24, 16),
        "layers.0.mlp.down_proj.weight": (16, 24),
    }
    shapes |= {f"layers.0.self_attn.{part}_proj.weight": (16, 16) for part in "qkvo"}
    shapes |= {
        f"layers.0.self_attn.{part}_norm.{kind}": (2, 8) for part in "qk" for kind in ("weight", "bias")
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain_anole(weights: dict[str, Tensor], features: Tensor, indices: Tensor) -> Tensor:
    """The released layer, written out: rotation of channel j with channel j + 4 of heads of 8 channels."""

    def norm(states: Tensor, name: str) -> Tensor:
        scaled = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[f"layers.0.{name}.weight"]

    def heads(states: Tensor, part: str) -> Tensor:
        split = F.linear(states, weights[f"layers.0.self_attn.{part}_proj.weight"]).unflatten(-1, (2, 8))
        if part == "v":
            return split.transpose(1, 2)
        scale, bias = (weights[f"layers.0.self_attn.{part}_norm.{kind}"] for kind in ("weight", "bias"))
        normed = (F.layer_norm(split, (8,), eps=1e-5) * scale + bias).transpose(1, 2)  # [b h n d]
        angles = torch.arange(states.shape[1])[:, None] * 10000.0 ** (-torch.arange(4) / 4)  # [n 4]
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        turned = torch.cat([-normed[..., 4:], normed[..., :4]], dim=-1)
        return normed * cos + turned * sin

    states = F.linear(
        torch.cat([F.embedding(indices, weights["embed_tokens.weight"]), features], dim=-1),
        weights["fc.weight"],
        weights["fc.bias"],
    )
    q, k, v = (heads(norm(states, "input_layernorm"), part) for part in "qkv")
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    states = states + F.linear(seen, weights["layers.0.self_attn.o_proj.weight"])
    gate, up = (
        F.linear(norm(states, "post_attention_layernorm"), weights[f"layers.0.mlp.{name}_proj.weight"])
        for name in ("gate", "up")
    )
    return states + F.linear(F.silu(gate) * up, weights["layers.0.mlp.down_proj.weight"])


@torch.inference_mode()
def test_the_drafter_of_anole_computes_what_its_layer_does() -> None:
    weights = anole_weights()
    network = upstream.load("lantern_drafter", weights, ANOLE)
    features, indices = torch.randn(2, 6, 16), torch.randint(13, (2, 6))
    predicted = network(features, network.embed_tokens(indices), torch.arange(6), CausalMask())
    torch.testing.assert_close(predicted, plain_anole(weights, features, indices), atol=1e-4, rtol=1e-4)


def test_foreign_and_missing_weights_are_listed() -> None:
    weights = anole_weights()
    with pytest.raises(ValueError, match=r"1 unexpected \(layers.0.self_attn.rotary_emb.inv_freq\)"):
        extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        upstream.load("lantern_drafter", weights | extra, ANOLE)
    del weights["layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.attn.qkv.weight\)"):
        upstream.load("lantern_drafter", weights, ANOLE)


def test_the_grid_follows_from_the_input_type() -> None:
    with torch.device("meta"):
        found = {kind: build_drafter(DRAFTER | {"input_type": kind}) for kind in ("t2i", "t2i2", "c2i")}
    assert {kind: (net.num_tokens, net.prefix_length) for kind, net in found.items()} == {
        "t2i": (256, 119),
        "t2i2": (1024, 119),
        "c2i": (576, 0),
    }
    with torch.device("meta"):
        assert build_drafter(DRAFTER | {"bias": False}).fuse.bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_type": "lumina"}, "unknown input_type 'lumina' of a drafter; known: t2i, t2i2, c2i, anole"),
        ({"num_key_value_heads": 1}, "as many heads of keys as of queries"),
    ],
)
def test_unknown_drafters_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_drafter(DRAFTER | changes)
    with pytest.raises(ValueError, match="the configuration lacks hidden_size"):
        build_drafter({"input_type": "t2i"})


@torch.inference_mode()
def test_a_target_is_llamagen_under_other_names() -> None:
    """The golden of LlamaGen itself, its matrices renamed and split as published here."""
    case = GoldenCase.read(GOLDENS.parent / "llamagen" / "t2i_tiny")
    ours = upstream.load("llamagen", case.weights, case.config)
    assert isinstance(ours, LlamaGenText)
    renamed = {}
    for key, tensor in case.weights.items():
        if key.endswith("attention.wqkv.weight"):
            layer = key.split(".")[1]
            for part, matrix in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = matrix
            continue
        for old, new in {
            "cls_embedding.": "model.cls_embedding.",
            "tok_embeddings.": "model.embed_tokens.",
            "layers.": "model.layers.",
            "attention.wo.": "self_attn.o_proj.",
            "feed_forward.w1.": "mlp.gate_proj.",
            "feed_forward.w2.": "mlp.down_proj.",
            "feed_forward.w3.": "mlp.up_proj.",
            "attention_norm.": "input_layernorm.",
            "ffn_norm.": "post_attention_layernorm.",
        }.items():
            key = key.replace(old, new)
        key = {"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(key, key)
        renamed[key] = tensor
    config = {
        "hidden_size": ours.config["dim"],
        "intermediate_size": ours.config["mlp_dim"],
        "num_hidden_layers": ours.config["depth"],
        "num_attention_heads": ours.config["num_heads"],
        "vocab_size": ours.codebook_size,
        "block_size": ours.num_tokens,
        "cls_token_num": ours.config["max_text_length"],
        "caption_dim": ours.config["text_dim"],
    }
    theirs = upstream.load("lantern", renamed, config)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    with pytest.raises(ValueError, match="input_type 't2i'; got 'c2i'"):
        build_target(config | {"input_type": "c2i"})
