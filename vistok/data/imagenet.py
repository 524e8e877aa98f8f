"""The 1000 ImageNet classes by name: index 0..999 in ascending order of WordNet id, names from timm."""

from __future__ import annotations

import functools
from difflib import get_close_matches

NUM_CLASSES = 1000


@functools.cache
def class_names() -> tuple[str, ...]:
    """Every class's names in index order, synonyms joined by commas, such as `"tench, Tinca tinca"`."""
    return tuple(_info().label_descriptions())


@functools.cache
def _info():
    from timm.data import ImageNetInfo  # several seconds, so only when a name is asked for

    return ImageNetInfo()


def class_index(name: str) -> int:
    """The class with this name, one of its synonyms or this WordNet id; upper and lower case are the same.

    Raises:
        ValueError: no class has the name (near ones are listed), or several have it (all are listed).
    """
    matches = _indices_by_name().get(_normal(name), ())
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"several ImageNet classes are called {name!r}; give the index of one: {_describe(matches)}"
        )
    close = get_close_matches(_normal(name), _indices_by_name(), n=5, cutoff=0.6)
    near = sorted({index for other in close for index in _indices_by_name()[other]})
    hint = f"did you mean {_describe(near)}?" if near else "indices 0 to 999 work too"
    raise ValueError(f"no ImageNet class is called {name!r}; {hint}")


@functools.cache
def _indices_by_name() -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for index, (wordnet_id, names) in enumerate(zip(_info().label_names(), class_names(), strict=True)):
        for name in {wordnet_id, _normal(names), *map(_normal, names.split(","))}:
            found.setdefault(name, []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def _describe(indices: tuple[int, ...] | list[int]) -> str:
    return "; ".join(f"{index} ({_info().index_to_description(index, detailed=True)})" for index in indices)


def _normal(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
