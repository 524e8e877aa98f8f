"""Operators of decoding in CUDA graphs: a replay computes what the definition does from the tensors as they are then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.running import never_waits, replayed
from vistok.kernels.decode_attention import decode_attention
from vistok.kernels.sampling import sample_tokens
from vistok.kernels.verification import verify_chain

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of values around 1
CLEAR = 1e-5  # sums in another order move the borders between ids by less
NAN = float("nan")


class Cache:
    """The storage of one layer with what `decode_attention` reads, rows of different lengths, NaN behind them."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, *, head_dim: int = 64, num_new: int = 1
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        self.block = (3, 6, num_new, head_dim)
        self.kv_block = (3, 2, num_new, head_dim)
        self.lengths = torch.tensor([0, 5, 40], device=device)
        self.keys, self.values = (self._random(3, 2, 67, head_dim) for _ in range(2))
        for storage in (self.keys, self.values):
            for row, length in enumerate(self.lengths.tolist()):
                storage[row, :, length:] = NAN
        self.q, self.k, self.v = self.fresh()
        self.keep = torch.ones(3, 67, dtype=torch.bool, device=device)
        self.keep[1, 1:4] = False
        angles = torch.rand(3, 1, num_new, head_dim // 2, generator=self.generator).to(device)
        self.rotation = angles.cos(), angles.sin()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def fresh(self) -> list[Tensor]:
        """Queries, keys and values of another block."""
        return [self._random(*shape) for shape in (self.block, self.kv_block, self.kv_block)]

    def attend(self, ancestors: Tensor | None = None, backend: str = "auto") -> Tensor:
        """One call over the tensors as they are."""
        return decode_attention(
            self.q,
            self.k,
            self.v,
            self.keys,
            self.values,
            self.lengths,
            ancestors=ancestors,
            rotation=self.rotation,
            keep=self.keep,
            backend=backend,
        )

    def expected(self, ancestors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """By the definition, in float32 from the same numbers: the result, and the storage after it."""
        keys, values = self.keys.float(), self.values.float()
        result = decode_attention(
            *(x.float() for x in (self.q, self.k, self.v)),
            keys,
            values,
            self.lengths,
            ancestors=ancestors,
            rotation=self.rotation,
            keep=self.keep,
            backend="reference",
        )
        return result, keys, values


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_new", "is_tree"), [(1, False), (5, False), (4, True)])
@torch.no_grad()
def test_replayed_decode_attention(
    device: torch.device, dtype: torch.dtype, num_new: int, is_tree: bool
) -> None:
    cache = Cache(dtype, device, num_new=num_new)
    ancestors = torch.ones(1, num_new, num_new, dtype=torch.bool, device=device).tril() if is_tree else None
    replay = replayed(lambda: cache.attend(ancestors), device)
    for _ in range(4):
        for tensor, fresh in zip((cache.q, cache.k, cache.v), cache.fresh(), strict=True):
            tensor.copy_(fresh)
        expected, keys, values = cache.expected(ancestors)
        result = replay()
        torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        for actual, wanted in ((cache.keys, keys), (cache.values, values)):
            torch.testing.assert_close(
                actual.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True
            )
        cache.lengths += num_new


@torch.no_grad()
def test_decode_attention_does_not_make_the_host_wait(device: torch.device) -> None:
    cache = Cache(torch.float32, device)
    backend = (
        "auto" if device.type == "cuda" else "reference"
    )  # "torch" looks at lengths where that costs nothing
    cache.attend(backend=backend)  # compiles
    with never_waits(device):
        cache.attend(backend=backend)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9}, {"top_k": 1}],
)
@pytest.mark.parametrize("vocab_size", [97, 4096, 20000])
@torch.no_grad()
def test_replayed_sampling(device: torch.device, settings: dict[str, float], vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, uniforms = torch.zeros(4, 3, vocab_size, device=device), torch.zeros(2, 3, device=device)
    scale = torch.tensor(1.0, device=device)
    replay = replayed(lambda: sample_tokens(logits, uniforms, guidance_scale=scale, **settings), device)
    num_clear = 0
    for number in range(1, 5):
        logits.copy_(2 * torch.randn(logits.shape, generator=generator))
        uniforms.copy_(torch.rand(uniforms.shape, generator=generator))
        scale.fill_(number)
        around = [
            sample_tokens(
                logits.cpu(),
                (uniforms.cpu() + shift).clamp(0, 1 - CLEAR),
                guidance_scale=float(number),
                backend="reference",
                **settings,
            )
            for shift in (-CLEAR, CLEAR)
        ]
        is_clear = around[0] == around[1]
        assert torch.equal(replay().cpu()[is_clear], around[0][is_clear])
        num_clear += int(is_clear.sum())
    assert num_clear >= 18  # of 24


@torch.no_grad()
def test_sampling_does_not_make_the_host_wait(device: torch.device) -> None:
    logits, uniforms = torch.zeros(4, 1, 4096, device=device), torch.rand(2, 1).to(device)

    def call() -> Tensor:
        return sample_tokens(logits, uniforms, guidance_scale=2.0, top_k=100, top_p=0.9)

    call()  # compiles
    logits[1, 0, 7] = NAN
    with never_waits(device):
        drawn = call()
    assert drawn[0] >= 0 and drawn[1] == -1  # a law that is none is no error yet


@pytest.mark.parametrize("has_draft", [True, False])
@torch.no_grad()
def test_replayed_verification(device: torch.device, has_draft: bool) -> None:
    """Rows of different lengths; laws of few ids, so that all of accepting, rejecting and ending occurs."""
    generator = torch.Generator().manual_seed(2)
    tokens, drafted = torch.zeros(8, 5, dtype=torch.int64), torch.tensor([5, 3, 1, 5, 0, 2, 4, 5])
    shapes = {"draft": (8, 5, 300), "target": (8, 6, 300), "uniforms": (8, 6)}
    host = {name: torch.zeros(shape) for name, shape in shapes.items()} | {
        "tokens": tokens,
        "drafted": drafted,
    }
    there = {name: tensor.to(device) for name, tensor in host.items()}

    def call(of: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        draft = of["draft"] if has_draft else None
        return verify_chain(
            of["tokens"], draft, of["target"], of["uniforms"], num_drafted=of["drafted"], backend=backend
        )

    replay = replayed(lambda: call(there, "auto"), device)
    counts = set()
    for _ in range(4):
        host["target"] = (4 * torch.randn(8, 6, 300, generator=generator)).softmax(-1)
        host["draft"] = (0.6 * host["target"][:, :5] + 0.4 * torch.full((8, 5, 300), 1 / 300)).contiguous()
        laws = host["draft"].flatten(0, 1)
        host["tokens"] = torch.multinomial(laws, 1, generator=generator).view(8, 5)
        host["uniforms"] = torch.rand(8, 6, generator=generator)
        for name, tensor in host.items():
            there[name].copy_(tensor)
        expected = call(host, "reference")
        accepted, following = (result.cpu() for result in replay())
        assert torch.equal(accepted, expected[0]) and torch.equal(following, expected[1])
        counts |= set(accepted.tolist())
    assert len(counts) >= 3


@torch.no_grad()
def test_verification_does_not_make_the_host_wait(device: torch.device) -> None:
    target = torch.rand(2, 5, 300).softmax(-1).to(device)
    tokens, uniforms = torch.zeros(2, 4, dtype=torch.int64, device=device), torch.rand(2, 5).to(device)
    verify_chain(tokens, None, target, uniforms)  # compiles
    with never_waits(device):
        verify_chain(tokens, None, target, uniforms)
