"""What every generator offers; each kind of decoding has its own protocol."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vistok.models.layers.kv_cache import KVCache
from vistok.tokens import Layout


class Generator(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Predicts the tokens of an image. It is built for a codebook and a layout, not for one tokenizer."""

    codebook_size: int  # ids 0 .. codebook_size - 1 are image tokens
    num_tokens: int
    layout: Layout = Layout()


class NextTokenGenerator(Generator):
    """A causal generator with explicit state."""

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` rows of a whole image."""
        raise NotImplementedError(f"{type(self).__name__} does not define new_cache()")

    def null_condition(self, batch_size: int) -> Tensor:
        """The condition of the unconditional branch, shaped like `prefill`'s."""
        raise NotImplementedError(f"{type(self).__name__} does not define null_condition()")

    def prefill(self, condition: Tensor, cache: KVCache) -> Tensor:
        """Feed the condition; returns the logits of the first token, `[b codebook_size]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define prefill()")

    def step(self, indices: Tensor, cache: KVCache) -> Tensor:
        """Feed one token per row, `[b]` int64; returns the logits of the next one, `[b codebook_size]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define step()")


class MaskedGenerator(Generator):
    """A bidirectional generator conditioned on a class: it sees decided tokens and masks, and predicts all positions."""

    num_classes: int

    @property
    def mask_token_id(self) -> int:
        """The id of an undecided position, the first after the codes."""
        return self.codebook_size

    @property
    def null_label(self) -> int:
        """The class label of the unconditional branch, the first after the classes."""
        return self.num_classes

    def forward(self, indices: Tensor, class_labels: Tensor) -> Tensor:
        """Predict every position.

        Args:
            indices: `[b n]` int64, codes and `mask_token_id`.
            class_labels: `[b]` int64 in `[0, num_classes)`, or `null_label`.

        Returns:
            Logits `[b n codebook_size]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")
