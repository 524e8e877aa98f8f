"""The configuration tree that FlexTok checkpoints carry, read as data.

The tree was made for a program that imports and calls the class each node names in `_target_`. Here no name is ever
imported or called: a node is accepted if its class is one of a fixed table and stands where that class belongs, and its
values become arguments of our own constructor. Everything else is refused.

It is stored twice: in `config.json`, and in the header of the weights file, one string per part in Python's notation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

MAX_TEXT = 32_768  # characters of one part in a header; the released ones have at most about 5,000
MAX_NODES = 10_000
MAX_NESTING = 16

ROOT_CLASSES = ("FlexTok", "FlexTokFromHub")
PART_CLASSES: dict[str, tuple[str, ...]] = {
    "vae": ("StableDiffusionVAE",),
    "encoder": ("SequentialModuleDictWrapper",),
    "decoder": ("SequentialModuleDictWrapper",),
    "regularizer": ("FSQ",),
    "flow_matching_noise_module": ("MinRFNoiseModule",),
    "pipeline": ("MinRFPipeline",),
}
# stages with tensors or settings, which must be there; their order in the file means nothing
STAGE_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "encoder": {
        "enc_patch_emb": ("PatchEmbedder",),
        "enc_posemb_module": ("PositionalEmbeddingAdder",),
        "enc_register_module": ("Registers1D",),
        "enc_seq_packer": ("BlockWiseSequencePacker",),
        "enc_transformer": ("FlexTransformer",),
        "enc_to_latents": ("LinearHead",),
    },
    "decoder": {
        "dec_from_latents": ("LinearLayer",),
        "dec_registers_posemb_module": ("PositionalEmbeddingAdder",),
        "dec_nested_dropout": ("MaskedNestedDropout",),
        "dec_latent_dropout": ("LearnedNullCond", "ZeroNullCond"),
        "dec_noise_patch_emb": ("PatchEmbedder",),
        "dec_patches_posemb_module": ("PositionalEmbeddingAdder",),
        "dec_seq_packer": ("BlockWiseSequencePacker",),
        "dec_time_embedder": ("TimestepEmbedder",),
        "dec_transformer": ("FlexTransformer",),
        "dec_to_patches": ("ToPatchesLinearHead",),
    },
}
# stages that only move data; there may be any number of them
PLUMBING_CLASSES = ("PerSampleOp", "SequenceUnpacker")
OPERATIONS = ("channels_first_to_last", "channels_last_to_first")
KNOWN_CLASSES = {
    *(name for classes in PART_CLASSES.values() for name in classes),
    *(name for side in STAGE_CLASSES.values() for classes in side.values() for name in classes),
    *PLUMBING_CLASSES,
    *OPERATIONS,
}

Node = Mapping[str, Any]


def is_tree(config: Node) -> bool:
    """Whether a configuration is such a tree, flat or below `config`, parsed or as the strings of a header."""
    config = _unnested(config)
    nodes = [config.get(part) for part in ("vae", "encoder", "decoder", "regularizer")]
    return all(isinstance(node, Mapping | str) and "_target_" in node for node in nodes)


def checked_parts(config: Node) -> dict[str, Node]:
    """The parts of a stored tree by name, each a mapping in which only known classes stand at known places.

    Args:
        config: the content of `config.json`, or the metadata of a weights file.

    Raises:
        ValueError: a class that is not in the tables, or not where it belongs; a directive to the program that made the
            tree; a part that is missing, too large or no plain literal.
    """
    config = _unnested(config)
    _check_root(config)
    parts = {}
    for name, classes in PART_CLASSES.items():
        if name not in config:
            raise ValueError(f"the FlexTok configuration lacks {name!r}")
        parts[name] = _parsed(name, config[name])
        _check_nodes(name, parts[name])
        check_class(name, parts[name], classes)
    return parts


def _check_root(config: Node) -> None:
    """Refuse nodes and directives beside the parts; plain entries, as the hub or file format add, mean nothing."""
    if "_target_" in config:
        check_class("the configuration", config, ROOT_CLASSES)
    for name, value in config.items():
        is_foreign = isinstance(value, Mapping | list | tuple) and name not in PART_CLASSES
        if is_foreign or (name.startswith("_") and name != "_target_"):
            raise ValueError(f"the FlexTok configuration holds {name!r}, which has no place there: refused")


def _unnested(config: Node) -> Node:
    inner = config.get("config")
    return inner if isinstance(inner, Mapping) else config


def _parsed(name: str, part: Any) -> Node:
    """A part as a mapping; the strings of a header are read as Python literals, never evaluated."""
    if isinstance(part, str):
        if len(part) > MAX_TEXT:
            raise ValueError(f"{name!r} of the FlexTok configuration is {len(part)} characters long: refused")
        try:
            part = ast.literal_eval(part)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise ValueError(
                f"{name!r} of the FlexTok configuration is not a plain literal: refused"
            ) from None
    if not isinstance(part, Mapping):
        raise ValueError(
            f"{name!r} of the FlexTok configuration must be a mapping, got {type(part).__name__}"
        )
    return part


def _check_nodes(name: str, part: Node) -> None:
    """Refuse every class, directive and kind of value that has no place in a released tree."""
    for count, (path, value) in enumerate(_walk(part, (name,))):
        place = ".".join(path)
        if count >= MAX_NODES or len(path) > MAX_NESTING:
            raise ValueError(f"the FlexTok configuration is too large or too deep at {place}: refused")
        if not isinstance(value, Mapping | list | tuple | str | int | float | None):
            raise ValueError(
                f"{place} is a {type(value).__name__}, which a configuration never holds: refused"
            )
        key = path[-1]
        if key == "_target_":
            _check_known(place, value)
        elif key == "_partial_":
            _check_partial(path, place, value)
        elif key.startswith("_"):
            raise ValueError(f"{place} is a directive that released configurations do not use: refused")


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a tree with its place, parents first."""
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{'.'.join(path)} has the key {key!r}, keys must be text: refused")
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, f"[{index}]"))


def _check_known(place: str, target: Any) -> None:
    if not isinstance(target, str) or class_name(target) not in KNOWN_CLASSES:
        raise ValueError(f"{place} names {str(target)[:80]!r}, which is no part of FlexTok: refused")


def _check_partial(path: tuple[str, ...], place: str, value: Any) -> None:
    if value is not True or not (path == ("pipeline", "_partial_") or path[-2] == "per_sample_op"):
        raise ValueError(f"{place} is a directive that does not belong there: refused")


def class_name(target: str) -> str:
    """The last element of a dotted path inside the package `flextok`, or nothing."""
    package, _, rest = target.partition(".")
    return rest.rpartition(".")[2] if package == "flextok" else ""


def check_class(place: str, node: Any, classes: tuple[str, ...]) -> None:
    """Raises ValueError unless `node` names one of `classes`; `place` is for the message."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    name = class_name(target) if isinstance(target, str) else ""
    if name not in classes:
        raise ValueError(f"{place} must be a {' or '.join(classes)}, got {str(target)[:80]!r}: refused")


def checked_stages(side: str, part: Node) -> dict[str, Node]:
    """The stages of the encoder or decoder by name, in whatever order they are stored."""
    stages = part.get("module_dict")
    if not isinstance(stages, Mapping):
        raise ValueError(f"{side} of the FlexTok configuration has no module_dict")
    for name, classes in STAGE_CLASSES[side].items():
        if name not in stages:
            raise ValueError(f"{side} of the FlexTok configuration lacks the stage {name!r}")
        check_class(f"{side}.{name}", stages[name], classes)
    for name in stages.keys() - STAGE_CLASSES[side].keys():
        check_class(f"{side}.{name}", stages[name], PLUMBING_CLASSES)
        if "per_sample_op" in stages[name]:
            check_class(f"{side}.{name}.per_sample_op", stages[name]["per_sample_op"], OPERATIONS)
    return dict(stages)
