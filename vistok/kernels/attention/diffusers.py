"""The attention backends of diffusers, by the names that diffusers gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vistok.kernels.attention.inputs import needs_gradients, share_heads
from vistok.kernels.attention.masks import AttentionMask, CausalMask

DIFFERENTIABLE = (
    "flash",
    "flash_hub",
    "_flash_3_hub",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
)
INFERENCE_ONLY = (  # those of sage quantise, their errors are larger than those of the dtype
    "_flash_3",
    "flash_4_hub",
    "aiter_fa2_hub",
    "sage",
    "sage_hub",
    "sage_blackwell_hub",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)
SHARES_HEADS = "flash", "flash_hub", "_flash_3_hub"


@dataclass(frozen=True)
class DiffusersBackend:
    """One of them, for no mask and for a causal one of as many queries as keys.

    Args:
        name: as in `diffusers.models.attention_dispatch.AttentionBackendName`. Those of `_hub` load their kernel from
            the Hugging Face Hub at the first call.
    """

    name: str

    def objections(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[str]:
        from diffusers.models import attention_dispatch as theirs

        reasons = []
        if not (mask is None or isinstance(mask, CausalMask)):
            reasons.append(f"takes no {type(mask).__name__}")
        elif isinstance(mask, CausalMask) and q.shape[-2] not in (1, k.shape[-2]):
            reasons.append(
                f"takes a causal mask of as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}"
            )
        if self.name in INFERENCE_ONLY and needs_gradients(q, k, v):
            reasons.append("has no gradient")
        if self.name not in {backend.value for backend in theirs.AttentionBackendName}:
            return [*reasons, "this version of diffusers has no such backend"]
        backend = theirs.AttentionBackendName(self.name)
        checks: list[Callable[..., None]] = [
            lambda **_: theirs._check_attention_backend_requirements(backend)
        ]
        if self.name != "_native_math" and q.device.type != "cuda":
            reasons.append(f"needs CUDA tensors, got {q.device.type}")
        else:
            checks += theirs._AttentionBackendRegistry._constraints[backend]
        return reasons + _complaints(checks, *(x.transpose(1, 2) for x in (q, k, v)))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float | None
    ) -> Tensor:
        from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

        if self.name not in SHARES_HEADS:
            k, v = share_heads(q, k, v)
        is_causal = isinstance(mask, CausalMask) and q.shape[-2] > 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b n h d]
        with attention_backend(self.name):  # which also loads a kernel
            return dispatch_attention_fn(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)


def _complaints(checks: list[Callable[..., None]], query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """What diffusers' checks raise for `[b n h d]` each."""
    found = []
    for check in checks:
        try:
            check(query=query, key=key, value=value)
        except (RuntimeError, ValueError) as complaint:
            found.append(str(complaint))
    return found
