"""Small stand-ins for the evaluation tests: an extractor of mean colours, a tokenizer, an emoji set, a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens


class MeanColour:
    """Three features: the mean of each channel."""

    name = "mean-colour"
    dim = 3
    weights = "none"
    weights_sha256 = ""
    preprocessing = "none"
    remark = ""
    device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.float().mean(dim=(2, 3))


class PatchTokenizer(ImageTokenizer):
    """Mean brightness of 8x8 patches in 16 steps: 16 tokens for an image of 32 pixels."""

    image_size = 32
    num_tokens = 16
    codebook_size = 16

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(7.5))

    def encode_all(self, images: Tensor) -> Tokens:
        self.check_images(images)
        levels = F.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
        return Tokens(indices=((levels + 1) * self.scale).round().long().flatten(1), codebook_size=16)

    def decode(self, tokens: Tokens) -> Tensor:
        levels = (tokens.data / self.scale - 1).view(-1, 1, 4, 4)
        return F.interpolate(levels, size=32).expand(-1, 3, -1, -1)


class RememberingPipeline:
    """Answers a known name with its colour and anything else with grey; remembers its calls."""

    def __init__(self, tokenizer: ImageTokenizer, colours: dict[str, tuple[int, int, int]]) -> None:
        self.tokenizer = tokenizer
        self.transformer = SimpleNamespace(text_length=64)
        self.colours = colours
        self.calls: list[dict] = []

    def __call__(self, prompt, *, seed=0, output_type="pil", **settings):
        self.calls.append({"prompt": prompt, "seed": seed, **settings})
        assert output_type == "pt" and len(seed) == len(prompt)
        colours = [self.colours.get(text, (128, 128, 128)) for text in prompt]
        images = torch.tensor(colours).float()[:, :, None, None] / 127.5 - 1
        return SimpleNamespace(images=images.expand(-1, -1, 32, 32))

    def sampling_settings(self, **given):
        return {"guidance_scale": 3.0, "temperature": 1.0, **given}

    def to(self, device):
        return self

    def set_progress_bar_config(self, **settings):
        pass


@pytest.fixture
def extractor() -> MeanColour:
    return MeanColour()


@pytest.fixture
def tokenizer() -> PatchTokenizer:
    return PatchTokenizer()


@pytest.fixture
def folder_of(tmp_path):
    """A function that writes pictures of one colour each into a folder."""

    def write(name: str, colours: list[tuple[int, int, int]], size: tuple[int, int] = (16, 16)) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for index, colour in enumerate(colours):
            Image.new("RGB", size, colour).save(folder / f"{index:04}.png")
        return folder

    return write


SUBCATEGORIES = {"fruit": (250, 20, 20), "plant": (20, 250, 20), "water": (20, 20, 250)}


@pytest.fixture
def emoji_colours() -> dict[str, tuple[int, int, int]]:
    """Name -> colour of the five emoji of each of three subcategories; near each other within one."""
    return {
        f"{subcategory} {number}": tuple(max(0, value - 4 * number) for value in colour)
        for subcategory, colour in SUBCATEGORIES.items()
        for number in range(5)
    }


@pytest.fixture
def emoji_folder(tmp_path, emoji_colours) -> Path:
    """A set of 18 pictures with 15 names: the last name of each subcategory is held out, the first has a variant."""
    folder = tmp_path / "emoji"
    index = []
    for code, (name, colour) in enumerate(emoji_colours.items()):
        split = "heldout" if name.endswith("4") else "train"
        for tone in ["", "dark skin tone"] if name.endswith("0") else [""]:
            file = f"{split}/{code:02}{'-dark' if tone else ''}.png"
            (folder / split).mkdir(parents=True, exist_ok=True)
            # 64 pixels, twice the tokenizer's size
            Image.new("RGB", (64, 64), colour).save(folder / file)
            index.append(
                {
                    "file": file,
                    "code": f"{code:02}",
                    "name": name,
                    "aliases": [],
                    "skin_tone": tone,
                    "category": "all",
                    "subcategory": name.split()[0],
                    "split": split,
                }
            )
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def pipeline(tokenizer, emoji_colours) -> RememberingPipeline:
    """Draws every emoji of the set perfectly."""
    return RememberingPipeline(tokenizer, emoji_colours)
