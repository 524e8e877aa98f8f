import colorsys

import pytest
import torch

from vistok.data.captions import can_turn_hue, captions, dominant_colors
from vistok.data.emoji import Emoji


def emoji(name="red apple", aliases=("apple",), tone="", category="Food & Drink") -> Emoji:
    return Emoji("train/x.png", "x", name, aliases, tone, category, "food-fruit", "train")


def disc(hue: float | None) -> torch.Tensor:
    """A patch of one hue (degrees) on white, or a grey one."""
    image = torch.ones(3, 32, 32)
    color = (0.5, 0.5, 0.5) if hue is None else colorsys.hsv_to_rgb(hue / 360, 0.8, 0.9)
    image[:, 8:24, 8:24] = torch.tensor(color)[:, None, None] * 2 - 1
    return image


@pytest.mark.parametrize(
    ("hue", "word"),
    [(0, "red"), (355, "red"), (25, "orange"), (55, "yellow"), (120, "green"), (225, "blue"), (280, "purple"),
     (320, "pink"), (None, None)],
)  # fmt: skip
def test_dominant_color(hue, word):
    assert dominant_colors(disc(hue)[None]) == [word]


def test_two_colors_have_no_dominant_one():
    image = disc(0)
    image[:, 8:24, 16:24] = disc(120)[:, 8:24, 16:24]
    assert dominant_colors(image[None]) == [None]


def test_a_color_replaces_the_one_in_the_name():
    assert captions(emoji(), None) == ["red apple", "apple"]
    assert captions(emoji(), "blue") == ["blue apple", "blue apple"]


def test_skin_tone_follows_the_name():
    assert captions(emoji("ok hand sign", (), "dark skin tone"), None) == ["ok hand sign dark skin tone"]


def test_faces_and_flags_keep_their_hue():
    assert can_turn_hue(emoji())
    assert not can_turn_hue(emoji(category="Flags"))
