from __future__ import annotations

import pytest

from vistok.data.imagenet import NUM_CLASSES, class_index, class_names


@pytest.mark.parametrize(
    ("name", "index"),
    [("golden retriever", 207), ("Golden_Retriever ", 207), ("tinca tinca", 0), ("n01443537", 1)],
)
def test_names_synonyms_and_wordnet_ids_are_found(name: str, index: int) -> None:
    assert class_index(name) == index


def test_an_ambiguous_name_lists_its_classes() -> None:
    with pytest.raises(ValueError, match=r"several ImageNet classes are called 'crane'.*134 .*517 "):
        class_index("crane")


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no ImageNet class is called 'golden retreiver'.*207 \(golden retriever"
    ):
        class_index("golden retreiver")


def test_there_are_a_thousand_classes() -> None:
    assert len(class_names()) == NUM_CLASSES
    assert class_names()[0] == "tench, Tinca tinca"
