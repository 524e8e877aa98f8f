"""The one entry to verifying chains: `verify_chain(tokens, draft_probs, target_probs, uniforms)`."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.sampling import draw
from vistok.kernels.triton_support import triton_objections
from vistok.kernels.verification.reference import reference_verify_chain

BACKENDS = ("auto", "reference", "triton")


def verify_chain(
    tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor,
    *,
    num_drafted: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens as far as the target agrees, and draw the one that follows; nothing comes to the host.

    A token is accepted with `min(1, target / draft)`. The next one is drawn from what `max(0, target - draft)` leaves
    after a rejection, and from the target after the last of the tokens. What comes out follows the target exactly.

    Args:
        tokens: `[b t]` int64, drafted one after the other.
        draft_probs: `[b t v]` float32, the distributions that they were drawn from; what lies behind the first t is not
            looked at. `None`: they are a function of what comes before them, as the most probable ones are.
        target_probs: `[b t+1 v]` float32, the target's distributions of the same positions and the one that follows.
        uniforms: `[b t+1]` in [0, 1): one per token, then one for the draw.
        num_drafted: `[b]` int64, how many of the tokens of each row count; all by default.
        backend: `"reference"` is plain PyTorch and runs anywhere, `"triton"` is one kernel; `"auto"` takes the kernel
            on CUDA tensors where it can run.

    Returns:
        How many tokens are accepted, `[b]` int64, and the one that follows them, `[b]` int64, which is -1 where it would
        come from no distribution, as of NaN.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or a named one that cannot run here.
    """
    _check_shapes(tokens, draft_probs, target_probs, uniforms, num_drafted)
    uniforms = uniforms.to(tokens.device, non_blocking=True)
    batch_size, count = tokens.shape
    if not tokens.numel():
        return torch.zeros_like(tokens[:, :1].sum(dim=1)), draw(target_probs[:, 0], uniforms[:, 0])
    if num_drafted is None:
        num_drafted = torch.full((batch_size,), count, device=tokens.device)
    num_drafted = num_drafted.clamp(0, count).contiguous()
    if _choose(tokens.device, backend) == "triton":
        from vistok.kernels.verification.triton import triton_verify_chain

        return triton_verify_chain(tokens, draft_probs, target_probs, uniforms, num_drafted)
    return reference_verify_chain(tokens, draft_probs, target_probs, uniforms, num_drafted)


def _check_shapes(
    tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor,
    num_drafted: Tensor | None,
) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 [b t], got {tokens.dtype} {list(tokens.shape)}")
    batch_size, count = tokens.shape
    if target_probs.ndim != 3 or target_probs.shape[:2] != (batch_size, count + 1):
        raise ValueError(
            f"target_probs must be [{batch_size} {count + 1} v], a distribution for each token and one for what "
            f"follows; got {list(target_probs.shape)}"
        )
    vocab_size = target_probs.shape[2]
    if draft_probs is not None and (
        draft_probs.ndim != 3
        or (len(draft_probs), draft_probs.shape[2]) != (batch_size, vocab_size)
        or draft_probs.shape[1] < count
    ):
        raise ValueError(
            f"draft_probs must be [{batch_size} {count} {vocab_size}], got {list(draft_probs.shape)}"
        )
    if uniforms.shape != (batch_size, count + 1):
        raise ValueError(f"uniforms must be [{batch_size} {count + 1}], got {list(uniforms.shape)}")
    if num_drafted is not None and num_drafted.shape != (batch_size,):
        raise ValueError(f"num_drafted must be [{batch_size}], got {list(num_drafted.shape)}")


def _choose(device: torch.device, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown verification backend {name!r}; available: {', '.join(BACKENDS)}")
    if name == "auto":
        can_run = device.type == "cuda" and not triton_objections(device)
        return "triton" if can_run else "reference"
    if name == "triton" and (reasons := triton_objections(device)):
        raise ValueError(f"verification backend {name!r} cannot run: {'; '.join(reasons)}")
    return name
