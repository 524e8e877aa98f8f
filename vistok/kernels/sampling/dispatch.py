"""The one entry to drawing tokens: `sample_tokens(logits, uniforms, ...)`."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.sampling.reference import check_filters, check_top_k, reference_sample_tokens
from vistok.kernels.triton_support import triton_objections

BACKENDS = ("auto", "reference", "triton")


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    typical_p: float = 1.0,
    guidance_scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Guide, filter and draw; nothing comes to the host.

    Args:
        logits: `[r k v]`, one distribution for each of k positions; r is b, or 2b with guidance, the conditional rows
            first.
        uniforms: `[b k]` in [0, 1), one draw per position; the same ones give the same tokens.
        temperature, top_k, top_p, typical_p: see `filtered_probabilities`.
        guidance_scale: 1.0 is off. A tensor lies on the device of the logits and is `[]`, or `[b k 1]` but for axes
            of 1.
        backend: `"reference"` is plain PyTorch and runs anywhere, `"triton"` is one kernel; `"auto"` takes the kernel
            on CUDA tensors where it can run.

    Returns:
        `[b k]` int64; -1 where guided logits are no distribution: a NaN, +inf, or none of them finite.

    Raises:
        ValueError: shapes that do not fit, a setting outside its range, an unknown backend, or a named one that cannot
            run this call (the reasons are listed).
    """
    _check_shapes(logits, uniforms, guidance_scale)
    check_filters(temperature, top_k, top_p, typical_p)
    check_top_k(top_k, logits.shape[-1])
    if _choose(logits, typical_p, backend) == "triton":
        from vistok.kernels.sampling.triton import triton_sample_tokens

        return triton_sample_tokens(
            logits,
            uniforms,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
    return reference_sample_tokens(
        logits,
        uniforms,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        guidance_scale=guidance_scale,
    )


def _check_shapes(logits: Tensor, uniforms: Tensor, guidance_scale: float | Tensor) -> None:
    if logits.ndim != 3 or uniforms.ndim != 2 or not logits.shape[2]:
        raise ValueError(
            f"logits must be [r k v] and uniforms [b k], got {list(logits.shape)} and {list(uniforms.shape)}"
        )
    batch_size, num_positions = uniforms.shape
    if len(logits) not in (batch_size, 2 * batch_size) or logits.shape[1] != num_positions:
        raise ValueError(
            f"uniforms {list(uniforms.shape)} go with logits of {batch_size} rows, or {2 * batch_size} with guidance, "
            f"and {num_positions} positions; got {list(logits.shape)}"
        )
    is_off = not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0
    if not is_off and len(logits) == batch_size > 0:
        raise ValueError(
            f"a guidance_scale needs unconditional logits behind the conditional ones, {2 * batch_size} rows; "
            f"got {batch_size}"
        )
    if isinstance(guidance_scale, Tensor):
        sizes = zip(guidance_scale.shape[::-1], (1, num_positions, batch_size), strict=False)
        if guidance_scale.ndim > 3 or any(size not in (1, fitting) for size, fitting in sizes):
            raise ValueError(
                f"guidance_scale must be [] or [{batch_size} {num_positions} 1] but for axes of 1, "
                f"got {list(guidance_scale.shape)}"
            )


def _choose(logits: Tensor, typical_p: float, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown sampling backend {name!r}; available: {', '.join(BACKENDS)}")
    if name == "auto" and logits.device.type != "cuda":
        return "reference"  # also where Triton's interpreter would run
    if name == "reference":
        return name
    reasons = objections(logits.device, typical_p)
    if name == "auto":
        return "reference" if reasons else "triton"
    if reasons:
        raise ValueError(f"sampling backend {name!r} cannot run: {'; '.join(reasons)}")
    return name


def objections(device: torch.device, typical_p: float = 1.0) -> list[str]:
    """Reasons why the kernel cannot run on tensors of this device; empty when it can."""
    reasons = list(triton_objections(device))
    if typical_p < 1:
        reasons.append(f"does not know typical_p, got {typical_p}")
    return reasons
