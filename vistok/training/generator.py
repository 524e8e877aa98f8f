"""Training a next-token generator on tokenized, captioned emoji."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vistok.data.captions import can_turn_hue, captions, dominant_colors
from vistok.data.emoji import Emoji, read_index
from vistok.data.images import load_files
from vistok.models.generators.text_ar import TextAR
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.training.augment import Augmentation, augment
from vistok.training.trainer import Task


@dataclass(frozen=True)
class GeneratorOptions:
    """Data of a generator training."""

    data: str  # folder of the emoji set, see vistok.data.emoji
    tokenizer: str  # folder of the trained tokenizer
    source_size: int = 128  # images are kept at this size and augmented before they are reduced
    variants: int = 8  # tokenized copies of each picture; the first is not augmented
    text_dropout: float = 0.1  # share of samples without text, for classifier-free guidance
    color_words: float = 0.3  # share of pictures of one clear colour that are captioned with it
    token_noise: float = (
        0.8  # largest share of a picture's tokens that the model sees those of another one for
    )


@dataclass(frozen=True)
class Captioned:
    """Tokens of one variant of all pictures of a split, and the colour word of each."""

    indices: Tensor  # [n t] int64
    colors: list[str | None]


class NextTokenTask(Task):
    """Cross-entropy of the image tokens given the text. A batch draws names evenly, then one picture of each.

    A model that sees only true tokens recognises a picture by its first few and forgets the text; when it then samples,
    one unlucky token leads it astray. So it sees tokens of other pictures mixed in, by a share drawn per picture.
    """

    def __init__(
        self,
        model: TextAR,
        options: GeneratorOptions,
        augmentation: Augmentation,
        device: torch.device,
        seed: int,
    ) -> None:
        self.model: Any = model
        self.options = options
        self.device = device
        index = read_index(Path(options.data))
        self.train = [emoji for emoji in index if emoji.split == "train"]
        self.heldout = [emoji for emoji in index if emoji.split == "heldout"]
        self.by_name = _group_by_name(self.train)
        tokenizer: Any = ConvTiTok.from_pretrained(options.tokenizer)
        tokenizer = tokenizer.to(device).eval()
        plain = Augmentation()
        pictures = self._load(self.train)
        self.variants = [
            self._tokenize(tokenizer, self.train, pictures, plain if i == 0 else augmentation, seed + i)
            for i in range(options.variants)
        ]
        heldout = self._tokenize(tokenizer, self.heldout, self._load(self.heldout), plain, seed)
        self.measured = {"train": (self.train, self.variants[0]), "heldout": (self.heldout, heldout)}

    def _load(self, emoji: list[Emoji]) -> Tensor:
        files = [Path(self.options.data) / one.file for one in emoji]
        return load_files(files, self.options.source_size)

    @torch.inference_mode()
    def _tokenize(
        self,
        tokenizer: ImageTokenizer,
        emoji: list[Emoji],
        pictures: Tensor,
        augmentation: Augmentation,
        seed: int,
    ) -> Captioned:
        generator = torch.Generator().manual_seed(seed)
        indices: list[Tensor] = []
        colors: list[str | None] = []
        for start in tqdm(range(0, len(emoji), 64), desc="tokenizing", unit="batch"):
            chunk = emoji[start : start + 64]
            images = pictures[start : start + 64].float() / 127.5 - 1
            varied = augment(images, augmentation, tokenizer.image_size, generator)
            named = [
                color if can_turn_hue(one) else None
                for one, color in zip(chunk, dominant_colors(varied), strict=True)
            ]
            # A picture without a clear colour cannot say in its caption that its hue was turned: keep the hue.
            still = augment(images, replace(augmentation, hue=0.0), tokenizer.image_size, generator)
            keep_hue = torch.tensor([color is None for color in named])
            varied = torch.where(keep_hue[:, None, None, None], still, varied)
            colors += named
            indices.append(tokenizer.encode(varied.to(self.device)).data.cpu())
        return Captioned(torch.cat(indices), colors)

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Texts `[b text_length]`, the tokens to predict `[b n]`, and the noisy ones that the model sees `[b n]`."""
        chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
        texts, indices = [], []
        for _ in range(batch_size):
            position = chance.choice(self.by_name[chance.randrange(len(self.by_name))])
            number = chance.randrange(len(self.variants))
            variant = self.variants[number]
            texts.append(self._text(self.train[position], variant.colors[position], number > 0, chance))
            indices.append(variant.indices[position])
        dropped = torch.rand(batch_size, generator=generator) < self.options.text_dropout
        condition = self._encode(texts)
        condition = torch.where(dropped[:, None], self.model.null_condition(batch_size), condition)
        target = torch.stack(indices)
        share = torch.rand(batch_size, 1, generator=generator) * self.options.token_noise
        is_noise = torch.rand(target.shape, generator=generator) < share
        seen = torch.where(is_noise, target.roll(1, dims=0), target)
        return condition.to(self.device), target.to(self.device), seen.to(self.device)

    def _text(self, emoji: Emoji, color: str | None, augmented: bool, chance: random.Random) -> str:
        # The colour of an augmented picture may not be what its name says, so the caption tells it.
        named = color if augmented or chance.random() < self.options.color_words else None
        return chance.choice(captions(emoji, named))

    def _encode(self, texts: list[str]) -> Tensor:
        longest = self.model.text_length
        return self.model.encode_text([text.encode()[:longest].decode(errors="ignore") for text in texts])

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mean negative log-likelihood per token in nats."""
        condition, target, seen = batch
        logits = self.model(condition, seen)
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten()), {}

    @torch.inference_mode()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Negative log-likelihood per token in nats of unaugmented pictures given their names, per split."""
        return {f"{name}_nll": self._nll(model, *data) for name, data in self.measured.items()}

    def _nll(self, model: Any, emoji: list[Emoji], data: Captioned, most: int = 256) -> float:
        chosen = range(0, len(emoji), max(1, len(emoji) // most))
        losses = []
        for start in range(0, len(chosen), 64):
            rows = list(chosen[start : start + 64])
            condition = self._encode([captions(emoji[row], None)[0] for row in rows])
            indices = data.indices[rows].to(self.device)
            logits = model(condition.to(self.device), indices).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none"))
        return torch.cat(losses).mean().item()


def _group_by_name(emoji: list[Emoji]) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for position, one in enumerate(emoji):
        groups[one.name].append(position)
    return list(groups.values())
