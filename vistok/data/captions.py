"""Texts for emoji pictures: names, short names, skin tones and colours."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.data.emoji import Emoji

# Upper ends of the hue ranges in degrees; the name stands for hues up to its end.
HUES = {
    15: "red",
    37: "orange",
    68: "yellow",
    165: "green",
    195: "turquoise",
    262: "blue",
    300: "purple",
    342: "pink",
}
COLORS = {*HUES.values(), "brown", "black", "white"}
# Turning the hue of a face, a hand or a flag makes another thing of it, not the same thing in another colour.
FIXED_COLOR_CATEGORIES = {"People & Body", "Smileys & Emotion", "Flags", "Component"}


def captions(emoji: Emoji, color: str | None) -> list[str]:
    """All texts that describe `emoji`, with `color` in front where one is given instead of any colour in the name."""
    texts = []
    for text in dict.fromkeys((emoji.name, *emoji.aliases)):
        if color is not None:
            kept = [word for word in text.split() if word not in COLORS]
            text = " ".join([color, *kept])
        texts.append(f"{text} {emoji.skin_tone}".strip())
    return texts


def can_turn_hue(emoji: Emoji) -> bool:
    """Whether the picture stays a picture of the same thing when its hue is rotated."""
    return emoji.category not in FIXED_COLOR_CATEGORIES


def dominant_colors(images: Tensor, *, share: float = 0.6, least: float = 0.08) -> list[str | None]:
    """The colour word of each of `images [b 3 H W]` in [-1, 1], `None` where no hue dominates.

    Args:
        images: pictures on white.
        share: of the colourful pixels, how many must have one colour word.
        least: of all pixels, how many must be colourful.
    """
    red, green, blue = (images.float() + 1).div(2).unbind(dim=1)  # [b H W] each
    high, low = torch.stack([red, green, blue]).amax(dim=0), torch.stack([red, green, blue]).amin(dim=0)
    chroma = (high - low).clamp_min(1e-6)
    hue = torch.where(
        high == red,
        ((green - blue) / chroma) % 6,
        torch.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    word = torch.bucketize(hue * 60, torch.tensor(list(HUES), dtype=hue.dtype)) % len(HUES)  # [b H W]
    colorful = (chroma > 0.25) & (high > 0.25)
    words = list(HUES.values())
    found: list[str | None] = []
    for image_word, image_colorful in zip(word, colorful, strict=True):
        counts = torch.bincount(image_word[image_colorful], minlength=len(words))
        clear = counts.sum() >= least * image_colorful.numel() and counts.max() >= share * counts.sum()
        found.append(words[int(counts.argmax())] if clear else None)
    return found
