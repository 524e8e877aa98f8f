"""Texts as the features of a frozen encoder, which some text-conditional generators are conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """What a text encoder says about a batch of texts, padded to one length.

    Args:
        features: `[b s d]` floating point, the last hidden states.
        keep: `[b s]` boolean, `False` on padding.

    Raises:
        ValueError: wrong shapes or dtypes, or a text with nothing to attend to.
    """

    features: Tensor
    keep: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or not self.features.is_floating_point():
            raise ValueError(
                f"text features must be floating point [b s d], got {self.features.dtype} {list(self.features.shape)}"
            )
        if self.keep.dtype != torch.bool or self.keep.shape != self.features.shape[:2]:
            raise ValueError(
                f"keep must be boolean {list(self.features.shape[:2])}, got {self.keep.dtype} {list(self.keep.shape)}"
            )
        if not bool(self.keep.any(dim=1).all()):
            raise ValueError("a text has no position to attend to; even the empty text has its end marker")

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str) -> TextFeatures:
        """As `Tensor.to`."""
        return TextFeatures(self.features.to(device), self.keep.to(device))

    def repeat_each(self, times: int) -> TextFeatures:
        """Every text `times` times in a row, `[b * times ...]`."""
        return TextFeatures(
            self.features.repeat_interleave(times, dim=0), self.keep.repeat_interleave(times, dim=0)
        )

    def join(self, other: TextFeatures) -> TextFeatures:
        """Both batches as one, padded to the longer.

        Raises:
            ValueError: features of different widths.
        """
        if self.features.shape[2] != other.features.shape[2]:
            raise ValueError(
                f"text features {self.features.shape[2]} and {other.features.shape[2]} wide come from different encoders"
            )
        longest = max(self.features.shape[1], other.features.shape[1])
        parts = [part._padded(longest) for part in (self, other.to(self.features.device))]
        features = [part.features.to(self.features.dtype) for part in parts]
        return TextFeatures(torch.cat(features), torch.cat([part.keep for part in parts]))

    def _padded(self, length: int) -> TextFeatures:
        more = length - self.features.shape[1]
        return TextFeatures(F.pad(self.features, (0, 0, 0, more)), F.pad(self.keep, (0, more)))


TextEncoder = Callable[[Sequence[str]], TextFeatures]


class T5TextEncoder:
    """A frozen T5 encoder (Raffel et al. 2020) with its text tokenizer.

    Args:
        text_tokenizer: a `transformers` tokenizer.
        encoder: a `transformers.T5EncoderModel`.
        max_length: longer texts are cut to so many tokens; the tokenizer's own limit when `None`.
    """

    def __init__(self, text_tokenizer: Any, encoder: Any, max_length: int | None = None) -> None:
        self.text_tokenizer = text_tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.max_length = max_length

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of `texts`; the empty text, the null condition of guidance, is one of them."""
        ids = self.text_tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        return TextFeatures(states.last_hidden_state, ids.attention_mask.bool())


def load_t5(
    name: str = "google/flan-t5-xl",
    *,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> T5TextEncoder:
    """The T5 encoder `name` of the hub, or of a local folder; only safetensors are read.

    Raises:
        ModuleNotFoundError: `transformers` is not installed.
        FileNotFoundError: the weights are not here and the hub cannot be reached.
    """
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading texts with {name} needs transformers: run `pip install transformers sentencepiece`, "
            "or pass text features that were made elsewhere"
        ) from None
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        encoder = T5EncoderModel.from_pretrained(
            name, use_safetensors=True, local_files_only=local_files_only
        )
    except OSError as error:
        raise FileNotFoundError(
            f"the text encoder {name} could not be had ({str(error).splitlines()[0]}); download it elsewhere and pass "
            "its folder to load_t5, or pass text features that were made elsewhere"
        ) from None
    return T5TextEncoder(text_tokenizer, encoder.to(device, dtype), max_length)
