"""Whether tokens follow the generator that they are said to be drawn from, judged by the tokens of ordinary images.

Once a generator has read an image, its distribution of every token given those before it is known. Where a token lies in
its distribution, as a number in [0, 1], is then uniform and independent of all others, if and only if the tokens follow
the generator (Rosenblatt 1952, "Remarks on a multivariate transformation"). So images of any prompts can be tested
together, and at every position, without counting images that are all different.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.speculative.accept import AcceptRule, Decision, JudgingRule, Proposals
from vistok.decoding.speculative.drafter import DraftStart
from vistok.decoding.speculative.laws import Drafts, all_drafts, node_law
from vistok.models.generators.base import Condition, NextTokenGenerator, join_conditions
from vistok.pipelines.settings import OrderedSettings

MOST_BINS, FEWEST_PER_BIN = 16, 16  # along one side of the square of pairs; pairs expected in every bin


@torch.no_grad()
def token_laws(
    model: NextTokenGenerator, condition: Condition, indices: Tensor, settings: OrderedSettings
) -> Tensor:
    """The distributions that the tokens of images are drawn from, each given the tokens before it.

    Args:
        model: the generator.
        condition: of the images, one row each.
        indices: `[b n]` int64, all tokens of the images.
        settings: how they are drawn.

    Returns:
        `[b n v]` float32.
    """
    num_images, num_tokens = indices.shape
    is_guided = settings.guidance_scale != 1.0
    rows = join_conditions(condition, model.null_condition_for(condition)) if is_guided else condition
    rows = rows.to(model.device)
    cache = model.new_cache(len(rows), num_tokens)
    schedule = settings.guidance(model.order)
    scales = torch.tensor([schedule.at(place, num_tokens) for place in range(num_tokens)])
    reading = model.read_prefix(rows, cache)
    start = DraftStart(model, rows, reading, scales, settings.sampling, is_guided, num_images)
    logits = [reading.logits]
    if num_tokens > 1:
        logits.append(model.step(start.rows(indices[:, :-1].to(model.device)), cache))
    places = torch.arange(num_tokens).expand(num_images, -1)
    return start.probabilities(torch.cat(logits, dim=1), places)


def places_in_laws(laws: Tensor, indices: Tensor, uniforms: Tensor) -> Tensor:
    """Where tokens lie when the ids of each distribution stand side by side, the most probable first.

    Args:
        laws: `[... v]`, the distributions.
        indices: `[...]` int64, one token of each.
        uniforms: `[...]` in [0, 1), where in the interval of its token each place is.

    Returns:
        `[...]` float64 in [0, 1]; uniform if the tokens are drawn from `laws`.
    """
    own = laws.gather(-1, indices[..., None])
    before = laws.double().masked_fill(laws <= own, 0.0).sum(dim=-1)
    equal = laws.double().masked_fill(laws != own, 0.0).sum(dim=-1)  # equally probable ids share an interval
    return (before + uniforms.double() * equal).clamp(0, 1)


@dataclass(frozen=True)
class LawCheck:
    """How the tokens of images compare with the laws that they should follow.

    Args:
        p_value: that they follow them, see `uniformity`.
        entropy: of the laws that were met, in bits, mean over all tokens.
        certain_share: of the tokens, those that had to be what they are: their law has no other.
    """

    p_value: float
    entropy: float
    certain_share: float


def check_laws(
    model: NextTokenGenerator,
    condition: Tensor,
    indices: Tensor,
    settings: OrderedSettings,
    *,
    batch_size: int,
    seed: int = 0,
) -> LawCheck:
    """Whether the tokens of images follow the generator.

    Args:
        model, condition, indices, settings: see `token_laws`.
        batch_size: images that are read at a time.
        seed: of the places within the tokens' intervals.
    """
    uniforms = torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)).to(indices.device)
    places, entropies, are_certain = [], [], []
    for rows in torch.arange(len(indices)).split(batch_size):
        laws = token_laws(model, condition[rows], indices[rows], settings)
        places.append(places_in_laws(laws, indices[rows], uniforms[rows]))
        entropies.append(torch.special.entr(laws).sum(dim=-1) / math.log(2))
        are_certain.append((laws > 0).sum(dim=-1) == 1)
    return LawCheck(
        p_value=uniformity(torch.cat(places)),
        entropy=float(torch.cat(entropies).mean()),
        certain_share=float(torch.cat(are_certain).double().mean()),
    )


def uniformity(places: Tensor) -> float:
    """The p-value of a chi-square test that places `[b n]` are uniform and those of disjoint pairs of tokens independent.

    Pairs of successive tokens are counted in the squares of a grid: if the places are uniform, every square is as likely
    as another.
    """
    pairs = places[:, : places.shape[1] // 2 * 2].reshape(-1, 2)
    side = max(2, min(MOST_BINS, math.isqrt(len(pairs) // FEWEST_PER_BIN)))
    bins = (pairs * side).long().clamp_max(side - 1)
    counts = (bins[:, 0] * side + bins[:, 1]).bincount(minlength=side**2).double()
    expected = len(pairs) / side**2
    distance = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor(side**2 - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, distance / 2))


class WatchedRule:
    """A rule that remembers the nodes at which it decided: targets `[v]` and the proposals there, of one row each."""

    def __init__(self, rule: AcceptRule) -> None:
        self.rule = rule
        self.is_lossless = rule.is_lossless
        self.nodes: list[tuple[Tensor, Proposals]] = []

    def decide(self, target: Tensor, proposals: Proposals, uniforms: Tensor) -> Decision:
        """As the rule does."""
        for row in proposals.exists.any(dim=1).nonzero()[:, 0].tolist():
            draft = None if proposals.draft is None else proposals.draft[row : row + 1]
            part = slice(row, row + 1)
            self.nodes.append((target[row], Proposals(proposals.tokens[part], proposals.exists[part], draft)))
        return self.rule.decide(target, proposals, uniforms)


def variation(rule: JudgingRule, target: Tensor, proposals: Proposals) -> float:
    """Total variation between the token that comes out at a node and its target `[v]`, in [0, 1].

    Proposals that are a function of the prefix are judged together. Of drawn ones the first alone counts, as if it was
    the only one; the law is the mean over all tokens that it can be.
    """
    if proposals.draft is None:
        drafts = Drafts.certain(proposals.tokens[proposals.exists].cpu())
    else:
        drafts = all_drafts(proposals.draft[0].cpu(), 1, with_replacement=False)
    target = target.cpu()
    return node_law(rule, target, drafts).total_variation(target)
