"""Drawing token ids from logits: guidance, filters and the draw as one operator."""

from vistok.kernels.sampling.dispatch import sample_tokens
from vistok.kernels.sampling.reference import (
    apply_guidance,
    check_filters,
    check_top_k,
    draw,
    filtered_probabilities,
)

__all__ = [
    "apply_guidance",
    "check_filters",
    "check_top_k",
    "draw",
    "filtered_probabilities",
    "sample_tokens",
]
