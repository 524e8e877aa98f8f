"""What `kernel_speed` times: operators at the sizes of released generators, each computed in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention import AttentionMask, CausalMask, KeyMask, OrderMask, attention
from vistok.kernels.attention.backends import BACKENDS as ATTENTION_BACKENDS
from vistok.kernels.decode_attention import decode_attention
from vistok.kernels.decode_attention.backends import objections
from vistok.kernels.rotation import rotate
from vistok.kernels.sampling import sample_tokens
from vistok.kernels.triton_support import triton_objections

PLAIN = "plain"
COMPILED = "torch, compiled"
COLD_BYTES = (
    2**27
)  # read by calls that follow each other: more than caches keep, as the weights of a model are
CLEAR = 1e-5  # sums in another order move the borders between token ids by less
ATTENTION_WAYS = ("sdpa", "xformers", "triton")
VOCAB_SIZE = 16384  # of LlamaGen


@dataclass(frozen=True)
class Subject:
    """An operator at one size.

    Attributes:
        kernel, setting: what it is called.
        num_bytes: that it must read and write.
        flops: floating-point operations.
        inputs: makes the argument of the ways from a seed.
        ways: name -> function of it; `PLAIN` is the plainest PyTorch.
        exact: what they should give, in float32 and by the definition; for tokens, the least and the largest id.
        num_inputs: how many different arguments calls in a row get.
        is_captured: whether calls are timed in a CUDA graph, as they run in a compiled loop.
        refused: ways that cannot run here, and why.
    """

    kernel: str
    setting: str
    num_bytes: float
    flops: float
    inputs: Callable[[int], Any]
    ways: dict[str, Callable[[Any], Tensor]]
    exact: Callable[[Any], Any]
    num_inputs: int = 1
    is_captured: bool = False
    refused: dict[str, str] = field(default_factory=dict)  # way -> why it cannot run here

    def difference(self, result: Tensor, exact: Any) -> float:
        """The largest difference; of tokens, how many are others."""
        if isinstance(exact, tuple):
            least, largest = exact
            return float(((result < least) | (result > largest)).sum())
        return (result.float() - exact).abs().max().item()


@dataclass(frozen=True)
class DecodeSizes:
    """One layer in the midst of an image."""

    rows: int
    heads: int
    num_new: int
    length: int  # positions stored
    max_length: int
    head_dim: int = 64

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.heads} heads of {self.head_dim}, {self.num_new} new on "
            f"{self.length} of {self.max_length}"
        )


DECODE = {  # guidance doubles the rows
    "LlamaGen-B": DecodeSizes(rows=2, heads=12, num_new=1, length=128, max_length=257),
    "NAR-B, a diagonal": DecodeSizes(rows=2, heads=12, num_new=16, length=120, max_length=257),
    "LlamaGen-XL, 512 px": DecodeSizes(rows=2, heads=20, num_new=1, length=512, max_length=1025),
    "LlamaGen-B, 8 images": DecodeSizes(rows=16, heads=12, num_new=1, length=128, max_length=257),
}
DECODE_LARGE = {  # seconds on a CPU
    "LlamaGen-B, 64 images": DecodeSizes(rows=128, heads=12, num_new=1, length=128, max_length=257),
    "NAR-B, a diagonal, 64 images": DecodeSizes(rows=128, heads=12, num_new=16, length=120, max_length=257),
    "LlamaGen-XL, 512 px, 64 images": DecodeSizes(rows=128, heads=20, num_new=1, length=512, max_length=1025),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "guidance": {},
    "guidance, top-k 2000": {"top_k": 2000},
    "guidance, top-k 2000, top-p 0.9": {"top_k": 2000, "top_p": 0.9},
}


def subjects(device: torch.device, dtype: torch.dtype) -> Iterator[Subject]:
    """All of them; large ones only on a GPU."""
    is_gpu = device.type == "cuda"
    for name, sizes in {**DECODE, **(DECODE_LARGE if is_gpu else {})}.items():
        yield decode_subject(name, sizes, device, dtype)
    for num_images in (1, 64) if is_gpu else (1, 8):
        for name, settings in SAMPLING.items():
            yield sampling_subject(name, num_images, settings, device, dtype)
    for name, mask in _masks(device).items():
        yield attention_subject(name, mask, 16 if is_gpu else 2, device, dtype)


def decode_subject(name: str, sizes: DecodeSizes, device: torch.device, dtype: torch.dtype) -> Subject:
    """New positions on a static cache, against a cache that is concatenated anew each time."""
    rows, heads, num_new, length, d = sizes.rows, sizes.heads, sizes.num_new, sizes.length, sizes.head_dim
    lengths = torch.full((rows,), length, device=device)
    angles = torch.arange(num_new * d // 2, device=device).view(num_new, d // 2) / 50
    rotation = angles.cos(), angles.sin()

    def inputs(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        blocks = torch.randn(3, rows, num_new, heads, d, device=device).to(dtype).transpose(2, 3)
        storage = torch.randn(2, rows, heads, sizes.max_length, d, device=device).to(dtype)
        return [*blocks, *storage]

    def way(backend: str) -> Callable[[list[Tensor]], Tensor]:
        def attend(tensors: list[Tensor]) -> Tensor:
            q, k, v, keys, values = tensors
            return decode_attention(q, k, v, keys, values, lengths, rotation=rotation, backend=backend)

        return attend

    def plain(tensors: list[Tensor]) -> Tensor:
        q, k, v, keys, values = tensors
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        keys, values = (torch.cat([x[:, :, :length], new], dim=2) for x, new in ((keys, k), (values, v)))
        return F.scaled_dot_product_attention(q, keys, values)

    def exact(tensors: list[Tensor]) -> Tensor:
        return way("reference")([x.float() for x in tensors])

    ways: dict[str, Callable[[Any], Tensor]] = {PLAIN: plain, "torch": way("torch")}
    refused = {}
    if reasons := _not_on_a_gpu(device) or objections("triton", *inputs(0)):
        refused["triton"] = "; ".join(reasons)
        ways[COMPILED] = torch.compile(way("torch"), fullgraph=True, dynamic=False)
    else:
        ways["triton"] = way("triton")
    element_size = torch.empty(0, dtype=dtype).element_size()
    num_bytes = (
        rows * heads * d * element_size * (2 * length + 6 * num_new)
    )  # new: q, k, v, result, and two written
    return Subject(
        kernel="decode attention",
        setting=f"{name}: {sizes}",
        num_bytes=num_bytes,
        flops=4 * rows * heads * d * num_new * (length + num_new),
        inputs=inputs,
        ways=ways,
        exact=exact,
        num_inputs=1 + COLD_BYTES // num_bytes,
        is_captured=True,
        refused=refused,
    )


def sampling_subject(
    name: str, num_images: int, settings: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Subject:
    """A token per image from the logits of both branches of guidance."""

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        logits = 3 * torch.randn(2 * num_images, 1, VOCAB_SIZE, device=device)
        return logits.to(dtype), torch.rand(num_images, 1, device=device)

    def sample(arguments: tuple[Tensor, Tensor], backend: str) -> Tensor:
        logits, uniforms = arguments
        return sample_tokens(logits, uniforms, guidance_scale=2.0, backend=backend, **settings)

    def exact(arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, uniforms = arguments
        least, largest = (
            sample((logits, (uniforms + shift).clamp(0, 1 - CLEAR)), "reference") for shift in (-CLEAR, CLEAR)
        )
        return least, largest

    ways: dict[str, Callable[[Any], Tensor]] = {PLAIN: lambda arguments: sample(arguments, "reference")}
    refused = {}
    if reasons := _not_on_a_gpu(device) or triton_objections(device):
        refused["triton"] = "; ".join(reasons)
    else:
        ways["triton"] = lambda arguments: sample(arguments, "triton")
    num_logits = 2 * num_images * VOCAB_SIZE
    return Subject(
        kernel="sampling",
        setting=f"{num_images} image{'s' if num_images != 1 else ''}, {VOCAB_SIZE} ids, {name}",
        num_bytes=num_logits * torch.empty(0, dtype=dtype).element_size(),
        flops=4 * num_logits,
        inputs=inputs,
        ways=ways,
        exact=exact,
        num_inputs=4,
        is_captured=True,
        refused=refused,
    )


def _not_on_a_gpu(device: torch.device) -> list[str]:
    """Why Triton's kernels are not timed there: its interpreter tells nothing about them."""
    return [] if device.type == "cuda" else ["needs a GPU to be timed"]


def _masks(device: torch.device) -> dict[str, AttentionMask | None]:
    """Of 256 tokens: none, causal, rows of different lengths, the order of a next-neighbour generator."""
    row, column = torch.arange(256) // 16, torch.arange(256) % 16
    keep = torch.arange(256, device=device) < torch.tensor([[256], [180]], device=device)
    ranks = (row + column).to(device)
    return {
        "none": None,
        "causal": CausalMask(),
        "lengths": KeyMask(keep),
        "diagonals": OrderMask(ranks, ranks),
    }


def attention_subject(
    name: str, mask: AttentionMask | None, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """Whole sequences of 256 tokens, twelve heads of 64, by the backends that `auto` chooses from."""
    shape = (3, batch_size, 12, 256, 64)
    if isinstance(mask, KeyMask):
        mask = KeyMask(mask.keep.repeat(batch_size // 2, 1))

    def inputs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.randn(shape, device=device).to(dtype)

    def way(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda blocks: attention(blocks[0], blocks[1], blocks[2], mask, backend=backend)

    ways: dict[str, Callable[[Any], Tensor]] = {PLAIN: way("reference")}
    refused = {}
    q, k, v = inputs(0).unbind()
    for backend in ATTENTION_WAYS:
        reasons = _not_on_a_gpu(device) if backend == "triton" else []
        if reasons := reasons or ATTENTION_BACKENDS[backend].objections(q, k, v, mask):
            refused[backend] = "; ".join(reasons)
        else:
            ways[backend] = way(backend)
    num_pairs = batch_size * 12 * 256 * 256
    return Subject(
        kernel="attention",
        setting=f"{batch_size} x 256 tokens, 12 heads of 64, mask: {name}",
        num_bytes=4 * batch_size * 12 * 256 * 64 * torch.empty(0, dtype=dtype).element_size(),
        flops=4 * 64 * num_pairs * _share_seen(mask),
        inputs=inputs,
        ways=ways,
        exact=lambda blocks: way("reference")(blocks.float()),
        refused=refused,
    )


def _share_seen(mask: AttentionMask | None) -> float:
    """Of the pairs of 256 positions, those that attend."""
    return 1.0 if mask is None else mask.dense(256, 256, torch.device("cpu")).float().mean().item()
