"""One or two positions of a tiny target, judged many times: for tests of the rules."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import AcceptRule, Proposals

NUM_CODES = 7


def markov_chain(seed: int, *, num_removed: int = 0, sharpness: float = 1.5) -> Tensor:
    """Distributions of the first token and, after each token, of the second: `[v+1 v]` float32.

    Of each, `num_removed` tokens have probability 0, as filters leave it.
    """
    logits = sharpness * torch.randn(NUM_CODES + 1, NUM_CODES, generator=torch.Generator().manual_seed(seed))
    order = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed + 1)).argsort(dim=1)
    return logits.scatter(1, order[:, :num_removed], -torch.inf).softmax(dim=1)


def draw(
    probs: Tensor, generator: torch.Generator, count: int = 1, *, with_replacement: bool = False
) -> Tensor:
    """`[b count]` from `probs [b v]`, one after another."""
    return torch.multinomial(probs, count, replacement=with_replacement, generator=generator)


def propose(draft: Tensor, num_children: int, kind: str, generator: torch.Generator) -> Proposals:
    """Children of one node per row: the most probable ones, or drawn from `draft [b v]`."""
    if kind == "deterministic":
        tokens = draft.topk(num_children, dim=1).indices
    else:
        is_independent = kind == "with replacement"
        tokens = draw(draft, generator, num_children, with_replacement=is_independent)
    exists = torch.ones_like(tokens, dtype=torch.bool)
    if kind == "deterministic":
        return Proposals(tokens, exists)
    return Proposals(tokens, exists, draft, with_replacement=kind == "with replacement")


def emit(
    rule: AcceptRule,
    target: Tensor,
    draft: Tensor,
    num_children: int,
    kind: str,
    *,
    count: int = 20_000,
    seed: int = 0,
) -> Tensor:
    """Two tokens per row, `[count 2]`, of the Markov chains `target` and `draft`, `[v+1 v]`.

    The second token is speculated upon only after an accepted first one; otherwise it is drawn from the target.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, 2 * num_children, generator=generator)
    node, rows = torch.full((count,), NUM_CODES), torch.arange(count)
    first, is_accepted, num_used = _one(rule, target, draft, node, num_children, kind, uniforms, generator)
    ranks = num_used[:, None] + torch.arange(num_children)
    speculated, _, _ = _one(
        rule, target, draft, first, num_children, kind, uniforms[rows[:, None], ranks], generator
    )
    plain = draw(target[first], generator)[:, 0]
    return torch.stack([first, torch.where(is_accepted, speculated, plain)], dim=1)


def _one(
    rule: AcceptRule,
    target: Tensor,
    draft: Tensor,
    node: Tensor,
    num_children: int,
    kind: str,
    uniforms: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The token after `node [b]`, whether it was drafted, and how many uniforms it took."""
    proposals = propose(draft[node], num_children, kind, generator)
    decision = rule.decide(target[node], proposals, uniforms[:, :num_children])
    is_accepted = decision.child >= 0
    extra = draw(decision.leftover, generator)[:, 0]
    drafted = proposals.tokens.gather(1, decision.child.clamp_min(0)[:, None])[:, 0]
    return torch.where(is_accepted, drafted, extra), is_accepted, decision.num_tried


def joint_law(target: Tensor) -> Tensor:
    """Of both tokens of a Markov chain `[v+1 v]`, `[v * v]` float64."""
    return (target[-1].double()[:, None] * target[:-1].double()).flatten()
