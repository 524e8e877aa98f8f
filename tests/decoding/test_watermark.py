"""The watermark: what it does to logits, that its p-values are exact, and that they hold what they promise."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from vistok import FlexARClass
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.streams import ImageStreams
from vistok.decoding.watermark import (
    Watermark,
    WatermarkKey,
    detect,
    green_moments,
    green_tail,
)
from vistok.tokens import Tokens

# Two codes fill half of the image, as white paper does; 12 of 48 tokens occur once.
REPEATED = [0] * 14 + [1] * 10 + [2, 3, 4, 5] * 3 + list(range(6, 18))
DISTINCT = list(range(40))
NUM_KEYS = 20_000


def tokens_of(*rows: list[int], codebook_size: int = 64) -> Tokens:
    return Tokens(indices=torch.tensor(rows), codebook_size=codebook_size)


@pytest.fixture(scope="module")
def many_lists() -> Tensor:
    """Four lists of each of NUM_KEYS keys, `[k 4 v]`; with fewer lists a key has the first of these."""
    return torch.stack([WatermarkKey(f"key {i}", 64).green_lists() for i in range(NUM_KEYS)])


def largest_sums(many_lists: Tensor, row: list[int], num_lists: int) -> Tensor:
    """The count of green tokens under the best list of each key, `[k]`."""
    return many_lists[:, :num_lists, torch.tensor(row)].sum(dim=-1).amax(dim=1)


def deviation(hits: int, rate: float) -> float:
    """How many standard deviations a count among NUM_KEYS lies above the one that `rate` promises."""
    return (hits - NUM_KEYS * rate) / math.sqrt(NUM_KEYS * rate * (1 - rate))


def test_lists_are_the_keys_and_nobody_elses() -> None:
    key = WatermarkKey("secret", 100, num_lists=3, green_fraction=0.3)
    lists = key.green_lists()
    assert lists.shape == (3, 100) and lists.sum(dim=1).tolist() == [30] * 3
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(WatermarkKey("secret", 100, 5, 0.3).green_lists()[:3], lists)
    assert not torch.equal(WatermarkKey("Secret", 100, 3, 0.3).green_lists(), lists)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(lists, 2))
    # Pinned: an image marked today must be found by every later version.
    assert WatermarkKey("secret", 16).green_lists()[0].nonzero()[:, 0].tolist() == [1, 2, 4, 6, 8, 9, 12, 15]
    assert [WatermarkKey("secret", 16).list_of(seed) for seed in range(8)] == [0, 3, 3, 1, 0, 1, 1, 3]


def test_every_list_is_used_about_equally() -> None:
    key = WatermarkKey("secret", 16)
    counts = Counter(key.list_of(seed) for seed in range(4000))
    assert sorted(counts) == [0, 1, 2, 3] and all(900 < count < 1100 for count in counts.values())


def test_only_the_logits_of_an_images_own_green_codes_rise() -> None:
    key = WatermarkKey("secret", 10, num_lists=2)
    logits = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    marked = Watermark(key, [1, 0, 1], strength=2.5)(logits)
    lists = key.green_lists()
    for row, number in enumerate([1, 0, 1]):
        expected = logits[row] + 2.5 * lists[number].float()
        torch.testing.assert_close(marked[row], expected, rtol=0, atol=0)
    assert torch.equal(Watermark(key, [1, 0, 1], strength=0)(logits), logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WatermarkKey("", 10), "key is empty"),
        (lambda: WatermarkKey("k", 10, num_lists=0), "num_lists must be at least 1, got 0"),
        (lambda: WatermarkKey("k", 10, green_fraction=0.01), "both on and off a list of 10, got 0.01"),
        (lambda: WatermarkKey("k", 10, green_fraction=float("nan")), "both on and off a list of 10, got nan"),
        (lambda: Watermark(WatermarkKey("k", 10), [0], strength=-1), "strength must be at least 0, got -1"),
        (lambda: Watermark(WatermarkKey("k", 10), [0], strength=float("nan")), "strength .* got nan"),
        (lambda: Watermark(WatermarkKey("k", 10), [4]), r"lists 0 to 3, got \[4\]"),
        (lambda: Watermark(WatermarkKey("k", 10), [0])(torch.zeros(2, 1, 10)), "1 images and 10 codes"),
        (lambda: Watermark(WatermarkKey("k", 10), [0])(torch.zeros(1, 1, 11)), "1 images and 10 codes"),
        (lambda: detect(tokens_of([1]), WatermarkKey("k", 10)), "for 10 codes, these tokens point into 64"),
        (lambda: detect(Tokens(latents=torch.zeros(1, 2, 3)), WatermarkKey("k", 10)), "continuous tokens"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 2, 4), (3,), (1, 1, 2, 2, 5), (2,) * 7, (1,) * 7])
def test_the_tail_and_the_moments_are_those_of_all_lists_counted_out(counts: tuple[int, ...]) -> None:
    weights = torch.tensor(counts + (0,) * (7 - len(counts)))
    sums = torch.tensor([weights[list(chosen)].sum() for chosen in itertools.combinations(range(7), 3)])
    tail = green_tail(counts, 7, 3)
    expected = [(sums >= s).double().mean() for s in range(sum(counts) + 1)]
    torch.testing.assert_close(tail, torch.stack(expected), rtol=1e-12, atol=1e-12)
    mean, variance = green_moments(torch.tensor(counts), 7, 3)
    assert mean == pytest.approx(sums.double().mean().item())
    assert variance == pytest.approx(sums.double().var(correction=0).item())


def test_a_tail_far_out_is_still_exact() -> None:
    tail = green_tail((1,) * 256, 4096, 2048)
    exact = math.comb(2048, 256) / math.comb(4096, 256)
    assert float(tail[256]) == pytest.approx(exact, rel=1e-9)
    assert 0 < exact < 1e-70


def test_several_lists_are_paid_for_and_padding_does_not_count() -> None:
    key = WatermarkKey("secret", 64, num_lists=3)
    sums = key.green_lists()[:, REPEATED].sum(dim=1)
    counts = tuple(sorted(Counter(REPEATED).values()))
    single = float(green_tail(counts, 64, 32)[sums.max()])
    padded = Tokens(
        indices=torch.tensor([REPEATED + [7] * 5]), lengths=torch.tensor([len(REPEATED)]), codebook_size=64
    )
    for tokens in (tokens_of(REPEATED), padded):
        found = detect(tokens, key)[0]
        assert found.p_value == pytest.approx(1 - (1 - single) ** 3)
        assert found.list_number == int(sums.argmax())
        mean, variance = green_moments(torch.tensor(counts), 64, 32)
        assert found.z_score == pytest.approx((int(sums.max()) - mean) / math.sqrt(variance))


@pytest.mark.parametrize("row", [REPEATED, DISTINCT], ids=["repeated", "distinct"])
@pytest.mark.parametrize("num_lists", [1, 4])
def test_false_positives_are_as_rare_as_claimed(many_lists, row: list[int], num_lists: int) -> None:
    """Unmarked tokens against many keys. S is discrete, so that the rate is the largest p-value up to the claimed one."""
    sums = largest_sums(many_lists, row, num_lists)
    tail = green_tail(tuple(sorted(Counter(row).values())), 64, 32)
    p_values = -torch.expm1(num_lists * torch.log1p(-tail))
    sample = [detect(tokens_of(row), WatermarkKey(f"key {i}", 64, num_lists))[0].p_value for i in range(20)]
    assert sample == pytest.approx(p_values[sums[:20]].tolist())
    for claimed in (1e-2, 1e-3):
        attained = float(p_values[p_values <= claimed].max())
        hits = int((p_values[sums] <= claimed).sum())
        assert deviation(hits, claimed) < 4
        assert abs(deviation(hits, attained)) < 4


def test_a_variance_that_ignores_repeats_would_raise_false_alarms(many_lists) -> None:
    """Kirchenbauer et al.'s z with independent tokens, kept here to show that the test above catches it."""
    sums, total = largest_sums(many_lists, REPEATED, 1).double(), len(REPEATED)
    counts = torch.tensor(list(Counter(REPEATED).values()))
    mean, variance = green_moments(counts, 64, 32)
    assert sums.mean() == pytest.approx(mean, abs=4 * math.sqrt(variance / NUM_KEYS))
    assert ((sums - mean) ** 2).mean() == pytest.approx(variance, rel=0.05)
    naive = (sums - mean) / math.sqrt(total / 4)
    for claimed in (1e-2, 1e-3):
        hits = int((naive > NormalDist().inv_cdf(1 - claimed)).sum())
        assert deviation(hits, claimed) > 20


@pytest.fixture(scope="module")
def model() -> FlexARClass:
    torch.manual_seed(0)
    sizes = {"codebook_size": 64, "num_tokens": 32, "dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 48}
    return FlexARClass(num_classes=5, **sizes).eval()


def draw(model: FlexARClass, seeds: list[int], watermark: Watermark | None, **options) -> Tokens:
    labels = torch.zeros(len(seeds), dtype=torch.int64)
    streams = ImageStreams.from_seeds(seeds)
    return generate_ordered(model, labels, streams=streams, logits_processor=watermark, **options)


@pytest.mark.parametrize("guidance", [ConstantGuidance(), ConstantGuidance(2.0)])
def test_marked_images_are_found_with_their_key_and_list_only(model, guidance) -> None:
    key, seeds = WatermarkKey("secret", 64), list(range(12))
    marked = draw(model, seeds, Watermark.for_seeds(key, seeds, 4.0), guidance=guidance)
    found = detect(marked, key)
    assert [image.list_number for image in found] == [key.list_of(seed) for seed in seeds]
    assert all(image.is_marked(1e-3) for image in found)
    assert not any(image.is_marked(1e-3) for image in detect(marked, WatermarkKey("other", 64)))
    plain = draw(model, seeds, None, guidance=guidance)
    assert not any(image.is_marked(1e-3) for image in detect(plain, key))
    unchanged = draw(model, seeds, Watermark.for_seeds(key, seeds, 0.0), guidance=guidance)
    assert torch.equal(unchanged.data, plain.data)


def test_an_images_mark_does_not_depend_on_its_neighbours(model) -> None:
    key = WatermarkKey("secret", 64)
    together = draw(model, [3, 4, 5], Watermark.for_seeds(key, [3, 4, 5], 4.0))
    alone = draw(model, [4], Watermark.for_seeds(key, [4], 4.0))
    assert torch.equal(alone.data[0], together.data[1])


def test_tokens_that_say_nothing_are_no_mark():
    """Every code once: any list has the same count."""
    (found,) = detect(Tokens(indices=torch.arange(16)[None], codebook_size=16), WatermarkKey("k", 16))
    assert (found.z_score, found.p_value) == (0.0, 1.0)
