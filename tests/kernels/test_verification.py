"""Verification of chains: the kernel against the reference, and the reference against the walk down a tree."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok.decoding.sampling import draw
from vistok.decoding.speculative.strict import StrictRule
from vistok.decoding.speculative.tree import DraftTree
from vistok.decoding.speculative.verify import verify
from vistok.kernels.triton_support import triton_objections
from vistok.kernels.verification import verify_chain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    bool(triton_objections(DEVICE)), reason="Triton runs neither here nor in its interpreter"
)


class Chain(NamedTuple):
    tokens: Tensor  # [b t]
    draft: Tensor  # [b t v]
    target: Tensor  # [b t+1 v]
    uniforms: Tensor  # [b t+1]
    num_drafted: Tensor  # [b]


def make(rows: int, count: int = 4, vocab_size: int = 50, seed: int = 0, distance: float = 0.5) -> Chain:
    """Drafts that are now and then rejected, from laws of which some tokens have no probability."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, count + 1, vocab_size, generator=generator)
    noise = distance * torch.randn(logits.shape, generator=generator)
    banned = torch.rand(logits.shape, generator=generator) < 0.2
    target = logits.masked_fill(banned, float("-inf")).softmax(dim=2)
    draft = (logits + noise)[:, :count].softmax(dim=2)
    tokens = draw(draft, torch.rand(rows, count, generator=generator))
    uniforms = torch.rand(rows, count + 1, generator=generator)
    num_drafted = torch.randint(count + 1, (rows,), generator=generator)
    return Chain(*(x.to(DEVICE) for x in (tokens, draft, target, uniforms, num_drafted)))


def walk(chain: Chain, is_drawn: bool) -> tuple[Tensor, Tensor]:
    """The same by the walk down a tree."""
    rows, count = chain.tokens.shape
    nodes = torch.arange(count + 1, device=DEVICE)
    tokens = torch.cat([torch.zeros_like(chain.tokens[:, :1]), chain.tokens], dim=1)
    draft = torch.cat([chain.draft, torch.zeros_like(chain.draft[:, :1])], dim=1) if is_drawn else None
    exists = nodes <= chain.num_drafted[:, None]
    tree = DraftTree(tokens, (nodes - 1).expand(rows, -1), exists, draft)
    verified = verify(tree, chain.target, StrictRule(), chain.uniforms[:, :-1])
    return verified.num_accepted, draw(verified.extra, chain.uniforms[:, -1])


@pytest.mark.parametrize("is_drawn", [True, False])
def test_reference_is_the_strict_rule_on_a_chain(is_drawn: bool) -> None:
    chain = make(2000)
    draft = chain.draft if is_drawn else None
    found = verify_chain(
        chain.tokens, draft, chain.target, chain.uniforms, num_drafted=chain.num_drafted, backend="reference"
    )
    expected = walk(chain, is_drawn)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert {0, 1} <= set(found[0].tolist())  # some of them are accepted, and some are not


def test_what_comes_out_follows_the_target() -> None:
    """Chi-square of the first token, drafted or not; 27.9 is the 0.999 quantile at 9 degrees of freedom."""
    num, generator = 20_000, torch.Generator().manual_seed(3)
    target, draft = (2 * torch.randn(2, 10, generator=generator)).softmax(dim=1)
    tokens = draw(draft.expand(num, 1, -1), torch.rand(num, 1, generator=generator))
    accepted, following = verify_chain(
        tokens,
        draft.expand(num, 1, -1),
        target.expand(num, 2, -1),
        torch.rand(num, 2, generator=generator),
    )
    first = torch.where(accepted > 0, tokens[:, 0], following)
    expected = num * target.double()
    assert ((first.bincount(minlength=10) - expected).square() / expected).sum() < 27.9
    assert 0.1 < (accepted == 0).float().mean() < 0.9


def test_nothing_comes_to_the_host() -> None:
    chain = make(3)
    for draft in (chain.draft, None):
        with no_host_sync():
            verify_chain(chain.tokens, draft, chain.target, chain.uniforms, backend="reference")


@needs_triton
@pytest.mark.parametrize("is_drawn", [True, False])
def test_kernel_gives_what_the_reference_gives(is_drawn: bool) -> None:
    chain = make(24, seed=1)
    draft = chain.draft if is_drawn else None
    expected, found = (
        verify_chain(*chain[:1], draft, *chain[2:4], num_drafted=chain.num_drafted, backend=name)
        for name in ("reference", "triton")
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@needs_triton
def test_kernel_reads_long_rows_in_parts_and_takes_the_trees_own_tensors() -> None:
    from vistok.kernels.verification.triton import triton_verify_chain

    chain = make(6, count=3, vocab_size=300, seed=2)
    tree_draft = torch.cat([chain.draft, torch.zeros_like(chain.draft[:, :1])], dim=1)
    expected = verify_chain(*chain[:4], backend="reference")
    everything = torch.full((6,), 3, device=DEVICE)
    found = triton_verify_chain(chain.tokens, tree_draft, *chain[2:4], everything, largest_block=128)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_edges(backend: str) -> None:
    nan = float("nan")
    target = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], device=DEVICE)
    same = target[:1].expand(1, 1, -1)

    def one(token: int, draft: Tensor | None, law: Tensor, uniforms: list[float]) -> tuple[int, int]:
        tokens = torch.tensor([[token]], device=DEVICE)
        numbers = torch.tensor([uniforms], device=DEVICE)
        found = verify_chain(tokens, draft, law[None], numbers, backend=backend)
        return found[0].item(), found[1].item()

    last = 1 - 2**-24
    assert one(0, same, target, [last, 0.3]) == (1, 1)  # target and draft agree: never rejected
    assert one(2, same, target, [0.0, 0.3]) == (0, 0)  # the draft cannot have drawn it: the target stays
    assert one(0, None, target, [0.5, 0.3]) == (0, 1)  # out of the target once it is rejected
    assert one(0, None, target, [0.49, 0.3]) == (1, 1)
    certain = torch.tensor([[1 - 2**-24, 0.0, 0.0], [0.0, 1.0, 0.0]], device=DEVICE)
    assert one(0, None, certain, [last, 0.3]) == (0, 0)  # nothing is left: rejected by rounding alone
    broken = torch.tensor([[nan, 0.5, 0.5], [0.0, 1.0, 0.0]], device=DEVICE)
    assert one(0, same, broken, [0.5, 0.3]) == (0, -1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nothing_drafted_is_a_draw_from_the_target(backend: str) -> None:
    chain = make(5, count=1)
    accepted, following = verify_chain(
        chain.tokens[:, :0], None, chain.target[:, :1], chain.uniforms[:, :1], backend=backend
    )
    assert accepted.tolist() == [0] * 5
    assert torch.equal(following, draw(chain.target[:, 0], chain.uniforms[:, 0]))
    empty = verify_chain(*(x[:0] for x in make(2)[:4]), backend=backend)
    assert [x.shape for x in empty] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", torch.zeros(2, 4), r"tokens must be int64 \[b t\]"),
        ("target_probs", torch.zeros(2, 4, 50), r"target_probs must be \[2 5 v\]"),
        ("draft_probs", torch.zeros(2, 4, 49), r"draft_probs must be \[2 4 50\]"),
        ("draft_probs", torch.zeros(2, 3, 50), r"draft_probs must be \[2 4 50\]"),
        ("uniforms", torch.zeros(2, 4), r"uniforms must be \[2 5\]"),
        ("num_drafted", torch.zeros(3, dtype=torch.int64), r"num_drafted must be \[2\]"),
        ("backend", "cutlass", "unknown verification backend 'cutlass'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: object, message: str) -> None:
    chain = make(2)
    given = {
        "tokens": chain.tokens,
        "draft_probs": chain.draft,
        "target_probs": chain.target,
        "uniforms": chain.uniforms,
    } | {name: value}
    with pytest.raises(ValueError, match=message):
        verify_chain(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1000, 16384, 64000])
def test_kernel_on_a_gpu(vocab_size: int) -> None:
    """But for the uniforms within rounding of a boundary, of which 64 rows hardly have one."""
    chain = make(64, count=5, vocab_size=vocab_size)
    expected, found = (
        verify_chain(*chain[:4], num_drafted=chain.num_drafted, backend=name)
        for name in ("reference", "triton")
    )
    assert torch.equal(found[0], expected[0]) and (found[1] != expected[1]).sum() <= 1
