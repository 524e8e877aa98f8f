"""Compile our Triton kernels for GPUs that are not here: `python -m tests.gpu.compile_kernels CAPABILITY...`.

The interpreter knows no types and no limits; the compiler does, and needs no GPU. Calls are made on CPU tensors, and every
launch only compiles. Prints a line of JSON for each kernel: what it is called by, its name, and the bytes of shared memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from vistok.kernels.attention import CausalMask, KeyMask, PackedMask, SelfMask
from vistok.kernels.attention.triton import triton_attention
from vistok.kernels.decode_attention.triton import triton_decode_attention
from vistok.kernels.sampling.triton import triton_sample_tokens
from vistok.kernels.verification.triton import triton_verify_chain

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


class Absent(DriverBase):
    """The driver of a GPU that kernels are compiled for and never run on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is run")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def attention_cases() -> Iterator[tuple[str, Call]]:
    """Forward and backward, for every kind of mask and odd heads."""

    def case(
        dtype: torch.dtype, head_dim: int, mask: Any, num_queries: int = 64, is_trained: bool = True
    ) -> Call:
        def call() -> None:
            shapes = [(2, 4, num_queries, head_dim), (2, 2, 64, head_dim), (2, 2, 64, head_dim)]
            q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=is_trained) for shape in shapes)
            out = triton_attention(q, k, v, mask)
            if is_trained:
                out.sum().backward()

        return call

    yield "attention, causal", case(BFLOAT16, 64, CausalMask())
    yield "attention, causal, float32", case(FLOAT32, 64, CausalMask())
    yield "attention, packed, 80 channels", case(BFLOAT16, 80, PackedMask((30, 34)))
    yield "attention, dense, 128 channels", case(BFLOAT16, 128, SelfMask())
    keep = torch.ones(2, 64, dtype=torch.bool)
    yield "attention, one query", case(BFLOAT16, 64, KeyMask(keep), num_queries=1, is_trained=False)


def decode_attention_cases() -> Iterator[tuple[str, Call]]:
    """A token, a block and a tree; whole and in parts; shared heads; odd sizes."""

    def case(
        num_new: int,
        *,
        dtype: torch.dtype = BFLOAT16,
        kv_heads: int = 4,
        parts: int = 2,
        dim: int = 64,
        tree: bool = False,
    ) -> Call:
        def call() -> None:
            q = torch.randn(2, 4, num_new, dim, dtype=dtype)
            k, v = (torch.randn(2, kv_heads, num_new, dim, dtype=dtype) for _ in range(2))
            keys, values = (torch.zeros(2, kv_heads, 257, dim, dtype=dtype) for _ in range(2))
            options: dict[str, Any] = {"rotation": (torch.ones(num_new, dim // 2),) * 2}
            if tree:
                options = {
                    "ancestors": torch.ones(1, num_new, num_new, dtype=torch.bool),
                    "keep": torch.ones(2, 257, dtype=torch.bool),
                }
            lengths = torch.tensor([5, 7])
            triton_decode_attention(q, k, v, keys, values, lengths, **options, num_parts=parts)

        return call

    yield "decode attention, one token", case(1)
    yield "decode attention, one token, float32", case(1, dtype=FLOAT32, parts=1)
    yield "decode attention, 16 tokens", case(16, parts=1)
    yield "decode attention, 64 tokens", case(64)
    yield "decode attention, tree, shared heads", case(8, kv_heads=1, dim=128, tree=True)
    yield "decode attention, 100 channels", case(3, kv_heads=2, dim=100, tree=True)


def sampling_cases() -> Iterator[tuple[str, Call]]:
    """Rows that fit into registers and one that does not, with all filters and with none."""

    def case(vocab_size: int, dtype: torch.dtype = BFLOAT16, **settings: Any) -> Call:
        filters = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "guidance_scale": 2.0} | settings

        def call() -> Tensor:
            return triton_sample_tokens(
                torch.randn(4, 1, vocab_size, dtype=dtype), torch.rand(2, 1), **filters
            )

        return call

    yield "sampling", case(16384, FLOAT32, temperature=1.0, top_k=None, top_p=1.0)
    yield "sampling, filters", case(16384, guidance_scale=torch.tensor(2.0))
    yield "sampling, long rows", case(64000)


def verification_cases() -> Iterator[tuple[str, Call]]:
    """With the distributions of a drafter and without; rows that fit into registers and one that does not."""

    def case(vocab_size: int, has_draft: bool) -> Call:
        def call() -> None:
            tokens, drafted = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 2])
            target = torch.rand(2, 5, vocab_size)
            triton_verify_chain(
                tokens, target[:, :4] if has_draft else None, target, torch.rand(2, 5), drafted
            )

        return call

    yield "verification", case(16384, has_draft=True)
    yield "verification, long rows, no distributions", case(64000, has_draft=False)


def compile_all(capability: int) -> Iterator[dict[str, Any]]:
    """All cases for a compute capability, as 90 for 9.0."""
    built: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        built.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run
    triton.runtime.driver.set_active(Absent(capability))
    for cases in (attention_cases(), decode_attention_cases(), sampling_cases(), verification_cases()):
        for name, call in cases:
            call()
            for kernel_name, kernel in built:
                shared = kernel.metadata.shared
                yield {"case": name, "kernel": kernel_name, "capability": capability, "shared": shared}
            built.clear()
    JITFunction.run = launch


def main() -> None:
    """The command line; see the module."""
    for capability in map(int, sys.argv[1:]):
        for row in compile_all(capability):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
