"""The configuration tree that FlexAR checkpoints carry, read as data.

Its nodes name classes (`_target_`) for a program that imports and calls them. Here they are only looked up, by their last
name, in a fixed table; a name that is not in it is refused, and nothing that a file names is ever imported or called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vistok.models.upstream.config import resolve

NORMS = {  # class -> (ours, epsilon unless given)
    "RMSNorm": ("rms", 1e-6),
    "LayerNorm": ("layer", 1e-5),
    "LayerNormFP32": ("layer", 1e-5),
    "LPLayerNorm": ("layer", 1e-5),
}
TEXT_ENCODERS = tuple(f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl"))
PACKAGES = ("flextok_ar", "l3m", "torch")  # whose classes a published tree names
TARGETS = {  # and which of them
    *("InSeriesMetaModels", "MetaModel", "NoGradModel", "Identity"),
    *("ARImageEmbedPreprocessor", "Transformer", "TransformerDecoder", "Block", "DecoderBlock"),
    *("EfficientAttention", "GeneralizedAttention", "GeneralizedAttentionWithMask"),
    *("SwiGLUFFN", "LinearClassifier", *NORMS),
    *("T5EmbedderWithMLP", "T5Embedder", "TextToEmbedMLP", "GELU", "SiLU"),
    "ImageResamplerTokenizer",
}
MOST = 2**24  # far beyond any release: a damaged file must not make us allocate


def is_flex_ar_tree(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is such a tree."""
    model = config.get("model")
    return isinstance(model, Mapping) and "meta_model" in model


def read_tree(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The task, "c2i" or "t2i", and the constructor arguments that a stored tree describes.

    Raises:
        ValueError: an entry that is missing, out of bounds or never released, or a class that is not in `TARGETS`.
    """
    meta_model = resolve(config)["model"]["meta_model"]
    check_tree(meta_model)
    parts = meta_model["models"]
    image_model = parts["ar_image_model"]
    preprocessor, trunk, head = image_model["preprocessor"], image_model["trunk"], image_model["head"]
    sizes = {
        "codebook_size": _integer(preprocessor, "codebook_size"),
        "num_tokens": _num_tokens(preprocessor),
        "dim": _integer(trunk, "embed_dim", 16384),
        "depth": _integer(trunk, "num_blocks", 256),
        "mlp_dim": _tree_mlp_dim(trunk),
        "bias": trunk.get("use_bias", True),
        "final_norm": trunk.get("post_trunk_norm", False),
        **_tree_norms(trunk),
    }
    if head.get("use_bias", True) or head.get("use_layernorm", False) or head.get("use_batchnorm", False):
        raise ValueError(
            "the FlexAR head must be a plain linear layer: use_bias, use_layernorm, use_batchnorm off"
        )
    if class_name(trunk) == "TransformerDecoder":
        return "t2i", sizes | _text_entries(parts["text_encoder"], trunk)
    return "c2i", sizes | {"num_classes": _integer(preprocessor, "num_classes")}


def check_tree(node: Any, place: str = "meta_model") -> None:
    """Raises ValueError if a node names a class that is not in `TARGETS`, or directs how it is to be made."""
    for key, value in _entries(node):
        if key == "_target_" and not is_known(value):
            raise ValueError(
                f"{place} names {str(value)[:80]!r}, which is no part of a published FlexAR; it was refused, not run"
            )
        if key.startswith("_") and key not in ("_target_", "_partial_"):
            raise ValueError(
                f"{place} has the entry {key}, which no published FlexAR has; it was refused, not run"
            )
        check_tree(value, f"{place}.{key}")


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif isinstance(node, list):
        yield from ((str(number), value) for number, value in enumerate(node))


def is_known(target: Any) -> bool:
    """Whether a dotted path is that of a class in `TARGETS`."""
    package, _, rest = str(target).partition(".")
    return package in PACKAGES and rest.rpartition(".")[2] in TARGETS


def class_name(node: Mapping[str, Any]) -> str:
    """Last name of the class that a node names."""
    return str(node.get("_target_", "")).rpartition(".")[2]


def _num_tokens(preprocessor: Mapping[str, Any]) -> int:
    height, width = preprocessor["token_grid_size"]
    height = _integer({"token_grid_size": height}, "token_grid_size")
    if width != 1:
        raise ValueError(
            f"this generator makes a grid of {height}x{width} tokens; its tokenizer is not FlexTok and is not supported"
        )
    if preprocessor.get("pos_embed_type") is None:
        raise ValueError("a FlexAR without positions was never released")
    return height


def _tree_mlp_dim(trunk: Mapping[str, Any]) -> int:
    ffn = trunk["ffn_target"]
    if class_name(ffn) != "SwiGLUFFN":
        raise ValueError(f"the MLP of FlexAR is a SwiGLUFFN, not a {class_name(ffn)}")
    if trunk.get("mlp_hidden_dim") is not None:
        hidden = _integer(trunk, "mlp_hidden_dim")
    else:
        hidden = int(trunk.get("mlp_ratio", 4) * trunk["embed_dim"])
    return mlp_dim(hidden, _integer({"multiple_of": 256, **ffn}, "multiple_of"))


def mlp_dim(hidden: int, multiple_of: int) -> int:
    """Hidden width of the gated MLP: two thirds of `hidden`, rounded up to a multiple."""
    return -(-int(2 * hidden / 3) // multiple_of) * multiple_of


def _tree_norms(trunk: Mapping[str, Any]) -> dict[str, Any]:
    """Norms, heads and biases, which all attentions of the trunk must share."""
    is_decoder = class_name(trunk) == "TransformerDecoder"
    names = ("self_attn_target", "cross_attn_target") if is_decoder else ("attn_target",)
    described = [_attention(trunk[name], trunk["embed_dim"]) for name in names]
    if any(other != described[0] for other in described):
        raise ValueError("self- and cross-attention of a FlexAR must have the same heads, norms and biases")
    if not trunk[names[0]].get("is_causal", False):
        raise ValueError("the self-attention of a FlexAR must be causal")
    kind, eps = _tree_norm(trunk.get("norm_layer")) or ("layer", 1e-6)
    return {"norm": kind, "norm_eps": eps, **described[0]}


def _attention(attention: Mapping[str, Any], dim: int) -> dict[str, Any]:
    if attention["dim"] != dim or attention.get("encoder_dim", dim) != dim:
        raise ValueError(f"the attention of a FlexAR must be as wide as its trunk, {dim}")
    if attention.get("qk_scale") is not None or any("pos_embed" in key for key in attention):
        raise ValueError("a FlexAR attention with its own scale or with rotary positions was never released")
    kind, eps = _tree_norm(attention.get("qk_norm")) or (None, 1e-6)
    return {
        "num_heads": _integer({"num_heads": 8, **attention}, "num_heads"),
        "qkv_bias": attention.get("qkv_bias", False),
        "qk_norm": kind,
        "qk_norm_eps": eps,
    }


def _tree_norm(node: Mapping[str, Any] | None) -> tuple[str, float] | None:
    if node is None:
        return None
    if class_name(node) not in NORMS:
        raise ValueError(f"the norm of a FlexAR is one of {', '.join(NORMS)}, not {class_name(node)!r}")
    kind, eps = NORMS[class_name(node)]
    if not (
        node.get("elementwise_gain", True) and node.get("elementwise_bias", True) and node.get("bias", True)
    ):
        raise ValueError("a FlexAR norm without weight or bias was never released")
    return kind, node.get("eps", eps)


def _text_entries(text_encoder: Mapping[str, Any], trunk: Mapping[str, Any]) -> dict[str, Any]:
    embedder, mlp = text_encoder["t5_embedder"], text_encoder["mlp"]
    name = embedder.get("hf_hub_path", "google/flan-t5-xl")
    if name not in TEXT_ENCODERS:
        raise ValueError(f"the text encoder {str(name)[:80]!r} is not one of {', '.join(TEXT_ENCODERS)}")
    if mlp.get("use_bias", False) or mlp["embed_dim"] != trunk["embed_dim"]:
        raise ValueError("the text projection of a FlexAR has no bias and ends at the width of the trunk")
    activation = mlp.get("act_layer") or {"approximate": "tanh"}
    return {
        "text_dim": _integer(mlp, "text_dim"),
        "text_gelu": activation.get("approximate", "none"),
        "text_encoder": name,
        "max_text_length": embedder.get("encoder_seqlen_max"),
    }


def tokenizer_hub_id(config: Mapping[str, Any]) -> str | None:
    """The hub repository of the FlexTok whose tokens a published generator makes, if its tree says so."""
    parts = resolve(config).get("model", {}).get("meta_model", {}).get("models", {})
    return parts.get("image_tokenizer", {}).get("model_id")


def _integer(node: Mapping[str, Any], name: str, most: int = MOST) -> int:
    value = node[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(
            f"{name} of the FlexAR configuration must be an integer in 1..{most}, got {str(value)[:80]}"
        )
    return value
