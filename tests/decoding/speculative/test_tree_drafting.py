"""Trees grown with a toy drafter whose distribution at every path is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vistok.decoding.sampling import SamplingParams
from vistok.decoding.speculative.dynamic_tree import (
    DynamicTreeParams,
    expand_candidates,
    first_candidates,
    select_tree,
)
from vistok.decoding.speculative.tree import NAMED_SHAPES, DraftTree, TreeShape
from vistok.decoding.speculative.tree_drafting import (
    DynamicDrafting,
    Level,
    SampledDrafting,
    TopDrafting,
    TreeDrafting,
    drafter_sampling,
    draw_without_replacement,
    static_drafting,
)
from vistok.decoding.streams import ImageStreams

VOCAB = 9
SHAPE = TreeShape.from_counts([[3], [2, 0, 2], [0, 1, 1]])

Path = tuple[int, ...]


class ToyDrafter:
    """Follows the nodes by what it is told about them alone, as a network would."""

    def __init__(self, names: list[int], num_possible: int = VOCAB) -> None:
        self.names = names  # what the distributions of a row depend on
        self.num_possible = num_possible
        self.above: list[list[Path]] = [[()] for _ in names]
        self.expanded: list[list[Path]] = [[] for _ in names]

    def probs(self, row: int, path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.names[row], *path)) % 2**31)
        probs = (torch.randn(VOCAB, generator=generator) * 1.5).softmax(dim=0)
        probs[torch.randperm(VOCAB, generator=generator)[self.num_possible :]] = 0
        return probs / probs.sum()

    @property
    def root_probs(self) -> Tensor:
        return torch.stack([self.probs(row, ()) for row in range(len(self.names))])

    def __call__(self, level: Level) -> Tensor:
        here = [
            [(*self.above[row][parent], token) for token, parent in zip(tokens, parents, strict=True)]
            for row, (tokens, parents) in enumerate(
                zip(level.tokens.tolist(), level.parents.tolist(), strict=True)
            )
        ]
        for row, paths in enumerate(here):
            self.expanded[row] += paths
            assert {len(path) for path in paths} == {level.depth}
        assert level.ancestors.shape == (*level.tokens.shape, len(self.expanded[0]))
        for row, paths in enumerate(here):
            for node, path in enumerate(paths):
                marked = [self.expanded[row][i] for i in level.ancestors[row, node].nonzero()[:, 0].tolist()]
                assert marked == [path[: i + 1] for i in range(len(path))]
        self.above = here
        return torch.stack(
            [torch.stack([self.probs(row, path) for path in paths]) for row, paths in enumerate(here)]
        )


def grow(drafting: TreeDrafting, drafter: ToyDrafter, seeds: list[int] | None = None) -> DraftTree:
    streams = ImageStreams.from_seeds(drafter.names if seeds is None else seeds)
    return drafting.grow(torch.tensor(drafter.names), drafter.root_probs, drafter, streams)


def paths_of(tree: DraftTree, row: int) -> dict[int, Path]:
    paths: dict[int, Path] = {0: ()}
    for node in range(1, tree.tokens.shape[1]):
        if tree.exists[row, node]:
            paths[node] = (*paths[int(tree.parents[row, node])], int(tree.tokens[row, node]))
    return paths


def chi_square_is_low(counts: Tensor, probs: Tensor) -> bool:
    """Whether counts agree with probabilities, below the 0.999 quantile (Wilson and Hilferty's approximation)."""
    expected = probs.double() * counts.sum()
    assert expected[probs > 0].min() > 5, "too few draws for the test to mean anything"
    if counts[probs == 0].sum() > 0:
        return False
    statistic = float(((counts - expected).square() / expected)[probs > 0].sum())
    freedom = int((probs > 0).sum()) - 1
    return statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def ordered_law(probs: Tensor, num_draws: int) -> Tensor:
    """Of drawing without replacement, `[v v ...]`: p(x1), p(x2) / (1 - p(x1)), ..."""
    law = torch.zeros([len(probs)] * num_draws, dtype=torch.float64)
    for tokens in itertools.permutations(range(len(probs)), num_draws):
        left, product = 1.0, 1.0
        for token in tokens:
            product *= float(probs[token]) / left
            left -= float(probs[token])
        law[tokens] = product
    return law


def draw_with_replacement(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.searchsorted(probs.double().cumsum(-1), uniforms.double(), right=True)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize(
    ("draw", "is_right"), [(draw_without_replacement, True), (draw_with_replacement, False)]
)
def test_draws_follow_the_law_without_replacement(draw: Callable, is_right: bool) -> None:
    """Of all three draws together, on 40000 rows; the test also sees what is wrong."""
    probs = torch.tensor([0.4, 0.0, 0.25, 0.2, 0.15])
    uniforms = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(0))
    tokens, exists = draw(probs.expand(40_000, 5), uniforms)
    assert exists.all()
    counts = torch.bincount(tokens @ torch.tensor([25, 5, 1]), minlength=125).double()
    assert chi_square_is_low(counts, ordered_law(probs, 3).flatten()) == is_right


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_draws_end_when_no_token_is_left(uniform: float) -> None:
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 1.0, 0.0, 0.0, 0.0]])
    tokens, exists = draw_without_replacement(probs, torch.full((3, 4), uniform))
    assert exists.sum(dim=1).tolist() == [2, 4, 1]
    for row in range(3):
        drawn = tokens[row][exists[row]].tolist()
        assert len(set(drawn)) == len(drawn)
        assert (probs[row, drawn] > 0).all()


def test_draws_of_a_large_flat_vocabulary_are_distinct() -> None:
    probs = torch.full((50, 16384), 1 / 16384)
    tokens, exists = draw_without_replacement(probs, torch.full((50, 10), 0.7))
    assert exists.all()
    assert all(len(set(row)) == 10 for row in tokens.tolist())


@pytest.mark.parametrize("shape", [SHAPE, TreeShape.chain(4), NAMED_SHAPES["mc_sim_7b_63"]])
def test_draft_probs_are_what_the_children_were_drawn_from(shape: TreeShape) -> None:
    drafter = ToyDrafter([3, 4])
    tree = grow(SampledDrafting(shape), drafter)
    assert tree.exists.all()
    assert tree.tokens[:, 0].tolist() == [3, 4]
    assert tree.parents[0].tolist() == list(shape.parents)
    for row in range(2):
        paths = paths_of(tree, row)
        for node, path in paths.items():
            inner = shape.num_children[node] > 0
            expected = drafter.probs(row, path) if inner else torch.zeros(VOCAB)
            assert torch.equal(tree.draft_probs[row, node], expected)
            children = [paths[child][-1] for child in shape.children(node)]
            assert len(set(children)) == len(children)


def test_a_chain_follows_the_drafter_s_joint_law() -> None:
    """Of both tokens, over 20000 seeds of one image."""
    num_images = 20_000
    toy = ToyDrafter([0], num_possible=4)
    first = toy.root_probs[0]
    second = torch.stack([toy.probs(0, (token,)) for token in range(VOCAB)])
    streams = ImageStreams.from_seeds(range(num_images))
    tree = SampledDrafting(TreeShape.chain(2)).grow(
        torch.zeros(num_images, dtype=torch.int64),
        first.expand(num_images, -1),
        lambda level: second[level.tokens],
        streams,
    )
    counts = torch.bincount(tree.tokens[:, 1] * VOCAB + tree.tokens[:, 2], minlength=VOCAB**2).double()
    law = (first[:, None] * second).flatten()
    common = law * num_images > 20  # the rare pairs are judged as one
    counts, law = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, law))
    assert chi_square_is_low(counts, law)


@pytest.mark.parametrize(
    "drafting",
    [SampledDrafting(SHAPE), TopDrafting(SHAPE), DynamicDrafting(DynamicTreeParams(3, 2, 12))],
    ids=["sampled", "top", "dynamic"],
)
def test_a_row_does_not_depend_on_its_neighbours(drafting: TreeDrafting) -> None:
    together = grow(drafting, ToyDrafter([0, 1, 2], num_possible=3))
    assert together.tokens.shape[1] == drafting.max_nodes + 1
    for name in range(3):
        alone = grow(drafting, ToyDrafter([name], num_possible=3))
        assert torch.equal(alone.tokens[0], together.tokens[name])
        assert torch.equal(alone.parents[0], together.parents[name])
        assert torch.equal(alone.exists[0], together.exists[name])


def test_a_stream_gives_the_same_number_of_draws_to_every_tree() -> None:
    after = []
    for num_possible in (1, VOCAB):
        drafter, streams = ToyDrafter([0], num_possible), ImageStreams.from_seeds([5])
        SampledDrafting(SHAPE).grow(torch.tensor([0]), drafter.root_probs, drafter, streams)
        after.append(streams.uniform(1))
    assert torch.equal(*after)
    assert grow(SampledDrafting(SHAPE), ToyDrafter([0]), [5]).tokens.tolist() == (
        grow(SampledDrafting(SHAPE), ToyDrafter([0]), [5]).tokens.tolist()
    )
    assert grow(SampledDrafting(SHAPE), ToyDrafter([0]), [6]).tokens.tolist() != (
        grow(SampledDrafting(SHAPE), ToyDrafter([0]), [5]).tokens.tolist()
    )


@pytest.mark.parametrize("drafting", [SampledDrafting(SHAPE), TopDrafting(SHAPE)], ids=["sampled", "top"])
def test_children_that_find_no_token_are_missing_with_all_below(drafting: TreeDrafting) -> None:
    """Two tokens are possible everywhere: the root's third child is missing, and its own children."""
    tree = grow(drafting, ToyDrafter([0, 1], num_possible=2))
    assert SHAPE.parents == (-1, 0, 0, 0, 1, 1, 3, 3, 5, 6)
    assert tree.exists.tolist() == [[True, True, True, False, True, True, False, False, True, False]] * 2
    assert not tree.tokens[~tree.exists].any()


def test_top_tokens_come_by_decreasing_probability_and_are_no_draws() -> None:
    drafter = ToyDrafter([0, 1])
    tree = grow(TopDrafting(SHAPE), drafter)
    assert tree.draft_probs is None
    for row in range(2):
        paths = paths_of(tree, row)
        for node, path in paths.items():
            best = drafter.probs(row, path).argsort(descending=True).tolist()
            children = [paths[child][-1] for child in SHAPE.children(node)]
            assert children == best[: len(children)]


def test_a_dynamic_tree_is_that_of_the_pure_functions() -> None:
    params = DynamicTreeParams(top_k=3, depth=2, total_tokens=12)
    drafter = ToyDrafter([0, 1], num_possible=5)
    tree = grow(DynamicDrafting(params), drafter)
    known = first_candidates(drafter.root_probs.log(), params)
    for _ in range(params.depth):
        log_probs = torch.stack(
            [
                torch.stack([drafter.probs(row, _path(known, row, int(place))).log() for place in places])
                for row, places in enumerate(known.beam)
            ]
        )
        known = expand_candidates(known, log_probs, params)
    expected = select_tree(known, torch.tensor([0, 1]), params)
    assert torch.equal(tree.tokens, expected.tokens)
    assert torch.equal(tree.parents, expected.parents)
    assert tree.draft_probs is None


def _path(known, row: int, place: int) -> Path:
    if place < 0:
        return ()
    return (*_path(known, row, int(known.parents[row, place])), int(known.tokens[row, place]))


def test_greedy_targets_get_top_tokens_of_an_unfiltered_drafter() -> None:
    greedy, sampled = SamplingParams(top_k=1), SamplingParams(top_k=5, temperature=0.7)
    assert static_drafting(SHAPE, greedy) == TopDrafting(SHAPE)
    assert static_drafting(SHAPE, sampled) == SampledDrafting(SHAPE)
    assert drafter_sampling(greedy) == SamplingParams()
    assert drafter_sampling(sampled) == sampled


@pytest.mark.parametrize("drafting", [SampledDrafting(SHAPE), DynamicDrafting(DynamicTreeParams(3, 2, 12))])
def test_distributions_that_do_not_fit_are_refused(drafting: TreeDrafting) -> None:
    roots, streams = torch.tensor([0]), ImageStreams.from_seeds([0])
    flat = torch.full((1, VOCAB), 1 / VOCAB)
    with pytest.raises(ValueError, match=r"\[1, 'v'\], got torch.float32 \[2, 9\]"):
        drafting.grow(roots, flat.expand(2, -1), lambda level: flat[:, None], streams)
    with pytest.raises(ValueError, match=r"got torch.float32 \[1, 1, 9\]"):
        drafting.grow(roots, flat, lambda level: flat[:, None], streams)
    with pytest.raises(ValueError, match="float32 distribution per node"):
        drafting.grow(roots, flat.bfloat16(), lambda level: flat[:, None], streams)
