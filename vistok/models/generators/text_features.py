"""Texts as the features of a frozen encoder, which some text-conditional generators are conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.models.generators.prompts import warn_of_cut


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

    def left_padded(self, length: int) -> TextFeatures:
        """The same texts with `length` positions, what counts at the end in its order, and zeros before it.

        The form that LlamaGen reads (Sun et al. 2024, section 2.2). Texts that have it already stay as they are, with
        what they have in their padding: the null text has its own features there, as released.

        Raises:
            ValueError: a text has more than `length` positions that count.
        """
        longest = int(self.keep.sum(dim=1).max()) if len(self) else 0
        if longest > length:
            raise ValueError(
                f"a text has {longest} tokens, this model reads at most {length}; cut it when it is encoded, "
                f"with max_length={length}"
            )
        padded = self._padded(max(length, self.keep.shape[1]))
        # False before True; `stable` leaves the positions that count in their order.
        places = padded.keep.long().argsort(dim=1, stable=True)[:, -length:]  # [b length]
        keep = padded.keep.gather(1, places)
        features = padded.features.take_along_dim(places[..., None], dim=1)
        is_moved = (places != torch.arange(length, device=places.device)).any(dim=1)
        return TextFeatures(features.masked_fill((~keep & is_moved[:, None])[..., None], 0.0), keep)

    def _padded(self, length: int) -> TextFeatures:
        more = length - self.features.shape[1]
        return TextFeatures(F.pad(self.features, (0, 0, 0, more)), F.pad(self.keep, (0, more)))


TextEncoder = Callable[[Sequence[str]], TextFeatures]


class T5TextEncoder:
    """A frozen T5 encoder (Raffel et al. 2020) with its text tokenizer.

    Args:
        text_tokenizer: a `transformers` tokenizer.
        encoder: a `transformers.T5EncoderModel`.
        max_length: longer texts are cut to so many tokens, the end marker included; the tokenizer's own limit when `None`.
        clean: applied to every text first, such as `clean_caption`.
    """

    def __init__(
        self,
        text_tokenizer: Any,
        encoder: Any,
        max_length: int | None = None,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.text_tokenizer = text_tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.max_length = max_length
        self.clean = clean

    def to(self, device: torch.device | str) -> T5TextEncoder:
        """Move the encoder."""
        self.encoder.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of `texts`; the empty text, the null condition of guidance, is one of them.

        Warns about texts that are cut, and says where.
        """
        texts = [self.clean(text) for text in texts] if self.clean is not None else list(texts)
        ids = self.text_tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.encoder.device)
        self._warn_of_cuts(texts, ids)
        states = self.encoder(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        return TextFeatures(states.last_hidden_state, ids.attention_mask.bool())

    def _warn_of_cuts(self, texts: Sequence[str], ids: Any) -> None:
        limit = self.max_length or self.text_tokenizer.model_max_length
        for text, row, length in zip(
            texts, ids.input_ids, ids.attention_mask.sum(dim=1).tolist(), strict=True
        ):
            if length < limit:
                continue
            size = len(self.text_tokenizer(text).input_ids)  # the whole of it
            if size > limit:
                kept = self.text_tokenizer.decode(row[:length], skip_special_tokens=True)
                warn_of_cut(kept, size, limit, "tokens")


def load_t5(
    name: str = "google/flan-t5-xl",
    *,
    max_length: int | None = None,
    clean: Callable[[str], str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> T5TextEncoder:
    """The T5 encoder `name` of the hub, or of a local folder; only safetensors are read.

    LlamaGen and NAR were trained on 120 tokens of flan-t5-xl and cleaned texts: `load_t5(max_length=120,
    clean=clean_caption)`.

    Raises:
        ModuleNotFoundError: `transformers` is not installed.
        FileNotFoundError: the weights are not here and the hub cannot be reached.
    """
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading texts with {name} needs transformers: run `pip install 'vistok[text]'`, "
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
    return T5TextEncoder(text_tokenizer, encoder.to(device, dtype), max_length, clean)
