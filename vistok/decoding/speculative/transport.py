"""How probable it can be at best that one of several drafts is accepted: a yardstick for rules.

An optimal rule is a transport plan between the drafts and the token that comes out, which puts as much mass as
possible where the token is among the drafts (Sun et al. 2023, "SpecTr", section 4: membership cost). Which of the
drafts came first makes no difference to that, so the plan is one between sets of tokens and tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.speculative.laws import all_drafts


def best_acceptance(target: Tensor, draft: Tensor, num_drafts: int, *, with_replacement: bool) -> float:
    """The largest probability with which a lossless rule can accept one of `num_drafts` drafts, by linear program.

    Args:
        target: `[v]` probabilities.
        draft: `[v]` probabilities that the drafts are drawn from, one after another.
        num_drafts: at least 1; without replacement, no more than the draft has tokens.
        with_replacement: whether each is drawn from the whole `draft`, or from what those before it left.

    Raises:
        ValueError: shapes that do not fit, or as `all_drafts`.
        RuntimeError: the linear program was not solved.
        ModuleNotFoundError: scipy is not installed.
    """
    if target.ndim != 1 or target.shape != draft.shape:
        raise ValueError(
            f"target and draft must be [v], got shapes {tuple(target.shape)} and {tuple(draft.shape)}"
        )
    sets, probs = _draft_sets(draft, num_drafts, with_replacement)
    return _most_transported(sets, probs, target.double())


def _draft_sets(draft: Tensor, num_drafts: int, with_replacement: bool) -> tuple[Tensor, Tensor]:
    """Sets of tokens that can be drafted, `[s v]` bool, and how probable each is, `[s]` float64."""
    drafts = all_drafts(draft, num_drafts, with_replacement=with_replacement)
    members = F.one_hot(drafts.tokens, len(draft)).any(dim=1)  # [m v]
    sets, ids = members.unique(dim=0, return_inverse=True)
    return sets, drafts.weights.new_zeros(len(sets)).scatter_add(0, ids, drafts.weights)


def _most_transported(sets: Tensor, probs: Tensor, target: Tensor) -> float:
    """How much of the sets `[s v]` with `probs [s]` can become a token of their own, where tokens hold `target [v]`."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import csr_array
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the best acceptance needs scipy: run `pip install 'vistok[eval]'`"
        ) from None

    pairs = sets.nonzero()  # a variable for each: how much of the set becomes the token
    variables = torch.arange(len(pairs))
    # A constraint per set, then one per token: how much there is of it.
    constraints = torch.cat([pairs[:, 0], len(sets) + pairs[:, 1]]).numpy()
    entries = torch.ones(len(constraints), dtype=torch.float64).numpy()
    places = (constraints, torch.cat([variables, variables]).numpy())
    used = csr_array((entries, places), shape=(sum(sets.shape), len(pairs)))
    available = torch.cat([probs, target]).numpy()
    plan = linprog(-entries[: len(pairs)], A_ub=used, b_ub=available, method="highs")
    if not plan.success:
        raise RuntimeError(f"the linear program for the best acceptance failed: {plan.message}")
    return float(-plan.fun)


def best_independent_acceptance(target: Tensor, draft: Tensor, num_drafts: int) -> Tensor:
    """`best_acceptance` of drafts drawn with replacement, in closed form and for any vocabulary.

    The dual problem asks for the set of tokens H that makes `draft(H) ** k - target(H)` largest, which is what the
    drafts have too much of. Such a set holds the tokens whose `draft / target` is largest, as `draft(H) ** k` is
    convex: of two tokens, exchanging one for another with a larger ratio does not hurt (after Hu et al. 2025,
    "Towards Optimal Multi-draft Speculative Decoding").

    Args:
        target, draft: `[b v]` probabilities.
        num_drafts: k, at least 1.

    Returns:
        `[b]` float64.
    """
    target, draft = target.double(), draft.double()
    ratio = torch.where(draft > 0, draft / target, 0.0)  # inf where only the draft has the token
    order = ratio.argsort(dim=1, descending=True)
    drafted, wanted = (probs.gather(1, order).cumsum(dim=1) for probs in (draft, target))
    return 1 - (drafted**num_drafts - wanted).amax(dim=1).clamp_min(0)
