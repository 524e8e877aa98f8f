"""What speculative decoding gains and what it costs: every drafter with every tree and rule, beside plain decoding.

Tokens per pass of the generator, time in turns with plain decoding, recognition and Fréchet distance of the images, and
whether the tokens follow the generator (`token_laws`). For relaxed rules also how far the law of a token is from the
generator's at single nodes of real images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vistok
from vistok.decoding.speculative.generate import SpeculationStatistics
from vistok.eval.machine import describe_machine
from vistok.eval.neighbours import Share
from vistok.eval.speculative_methods import NamedDrafter, NamedRule
from vistok.eval.speculative_subject import BATCH_SIZE, Judge, Quality, Subject
from vistok.eval.timing import median_seconds
from vistok.eval.token_laws import LawCheck, WatchedRule, variation
from vistok.files import atomic_path
from vistok.models.identity import model_identity
from vistok.pipelines.speculation import SpeculativeDecoding
from vistok.tokens import concatenate

JSON_FILE = "speculative.json"
NUM_PLAIN = (
    3  # times that all images are drawn plainly, with other seeds each: what chance does to the measures
)
NUM_WATCHED, NUM_NODES = 4, 48  # images drawn to watch a relaxed rule, and nodes at which it is judged


@dataclass(frozen=True)
class PlainRow:
    """All images, drawn plainly."""

    first_seed: int
    laws: LawCheck
    quality: Quality | None


@dataclass(frozen=True)
class Timing:
    """The same images drawn with and without speculation, in turns."""

    batch_size: int
    seconds: float  # per image, median
    plain_seconds: float
    speed_up: float
    target_passes: float  # of a batch, mean, the prefix not counted
    draft_passes: float


@dataclass(frozen=True)
class Row:
    """A drafter with a tree and a rule.

    Args:
        drafter, tree, network, num_parameters: see `NamedDrafter`.
        rule: its name.
        is_lossless: whether the rule promises the law of plain decoding.
        tokens_per_pass: drawn per pass of the generator, over all images; plain decoding has 1.0.
        passes_saved: share of the generator's passes, the prefix not counted.
        laws: whether the tokens follow the generator.
        mean_variation, largest_variation: of relaxed rules, over nodes, see `variation`.
        quality: of the images; `None` if nothing was given to compare with.
        timings: per batch size.
    """

    drafter: str
    tree: str
    network: str
    num_parameters: int
    rule: str
    is_lossless: bool
    tokens_per_pass: float
    passes_saved: float
    laws: LawCheck
    mean_variation: float | None
    largest_variation: float | None
    quality: Quality | None
    timings: list[Timing]

    @property
    def key(self) -> tuple[str, ...]:
        """What distinguishes it from other rows."""
        return self.drafter, self.tree, self.network, self.rule


@dataclass(frozen=True)
class Protocol:
    """What all rows have in common."""

    model: str
    generator: str  # identity
    tokenizer: str  # identity
    num_tokens: int
    sampling: dict[str, Any]
    num_images: int
    num_timed: int
    batch_sizes: list[int]
    repeats: int
    extractor: str | None
    real: str | None
    dtype: str
    num_threads: int
    machine: str
    vistok: str

    @classmethod
    def of(
        cls,
        subject: Subject,
        judge: Judge | None,
        *,
        num_timed: int,
        batch_sizes: Sequence[int],
        repeats: int,
    ) -> Protocol:
        """Of a measurement in this process.

        Raises:
            ValueError: there are fewer images than are to be timed, or fewer of these than in a batch.
        """
        if not 1 <= max(batch_sizes) <= num_timed <= len(subject):
            raise ValueError(
                f"{num_timed} images are to be timed, in batches of up to {max(batch_sizes)}; they must be at least as "
                f"many as the largest batch and at most all {len(subject)}"
            )
        return cls(
            model=subject.name,
            generator=model_identity(subject.model),
            tokenizer=subject.tokenizer.identity(),
            num_tokens=subject.model.num_tokens,
            sampling=asdict(subject.settings),
            num_images=len(subject),
            num_timed=num_timed,
            batch_sizes=list(batch_sizes),
            repeats=repeats,
            extractor=None if judge is None else judge.extractor.name,
            real=None if judge is None else f"{len(judge.real)} images, {judge.real.source}",
            dtype=str(subject.model.dtype).removeprefix("torch."),
            num_threads=torch.get_num_threads(),
            machine=str(describe_machine()),
            vistok=vistok.__version__,
        )


@dataclass(frozen=True)
class Report:
    """All that was measured with one protocol, by one or several commands."""

    protocol: Protocol
    plain: list[PlainRow]
    rows: list[Row]


def evaluate_speculative(
    subject: Subject,
    judge: Judge | None,
    drafters: Sequence[NamedDrafter],
    rules: Sequence[NamedRule],
    protocol: Protocol,
    folder: Path,
) -> Report:
    """Measure every drafter with every rule.

    Rows are kept in `folder` as they are done. What is there already, from an earlier call with the same protocol, is not
    measured again and stays in the report.

    Args:
        subject: the generator and its images.
        judge: measures their quality; `None` leaves it out.
        drafters, rules: what to measure, each with each.
        protocol: see `Protocol.of`.
        folder: where the report is, or will be; exists.

    Raises:
        ValueError: a drafter does not fit the generator, or the folder holds a measurement with another protocol.
    """
    methods = [(drafter, rule) for drafter in drafters for rule in rules]
    for drafter, rule in methods:  # before hours are spent on those in front of it
        subject.speculate(range(1), SpeculativeDecoding(drafter.drafter, rule.rule), num_tokens=2)
    report = read_report(folder / JSON_FILE, protocol) or Report(protocol, [], [])
    while len(report.plain) < NUM_PLAIN:
        report.plain.append(_measure_plain(subject, judge, first_seed=len(report.plain) * len(subject)))
        _save(report, folder)
    known = {row.key for row in report.rows}
    for drafter, rule in tqdm(methods, desc="speculative decoding", unit="row"):
        if (drafter.name, drafter.tree, drafter.network, rule.name) not in known:
            report.rows.append(_measure(subject, judge, drafter, rule, protocol))
            _save(report, folder)
    return report


def read_report(path: Path, protocol: Protocol) -> Report | None:
    """What is stored at `path`, if anything is.

    Raises:
        ValueError: it was measured with another protocol.
    """
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(asdict(protocol)))
    different = [
        field.name for field in fields(Protocol) if stored["protocol"].get(field.name) != ours[field.name]
    ]
    if different:
        raise ValueError(
            f"{path.parent} holds a measurement with other {', '.join(different)}, with which this one cannot be "
            "compared; choose another folder"
        )
    plain = [
        PlainRow(row["first_seed"], LawCheck(**row["laws"]), _quality(row["quality"]))
        for row in stored["plain"]
    ]
    rows = [
        Row(
            **{
                **row,
                "laws": LawCheck(**row["laws"]),
                "quality": _quality(row["quality"]),
                "timings": [Timing(**timing) for timing in row["timings"]],
            }
        )
        for row in stored["rows"]
    ]
    return Report(protocol, plain, rows)


def _quality(stored: dict[str, Any] | None) -> Quality | None:
    if stored is None:
        return None
    share = stored["recognised"]
    return Quality(stored["frechet_distance"], None if share is None else Share(**share))


def _save(report: Report, folder: Path) -> None:
    with atomic_path(folder / JSON_FILE) as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _measure_plain(subject: Subject, judge: Judge | None, first_seed: int) -> PlainRow:
    parts = tqdm(subject.batches(len(subject), BATCH_SIZE), desc="plain decoding", unit="batch", leave=False)
    tokens = concatenate([subject.plain(part, first_seed) for part in parts])
    quality = None if judge is None else judge(subject, tokens, f"plain, seeds from {first_seed}")
    return PlainRow(first_seed, subject.check_laws(tokens), quality)


def _measure(
    subject: Subject, judge: Judge | None, drafter: NamedDrafter, rule: NamedRule, protocol: Protocol
) -> Row:
    decoding = SpeculativeDecoding(drafter.drafter, rule.rule)
    title = f"{drafter.name}, {drafter.tree}, {rule.name}"
    parts = tqdm(subject.batches(len(subject), BATCH_SIZE), desc=title, unit="batch", leave=False)
    drawn = [subject.speculate(part, decoding) for part in parts]
    tokens = concatenate([one.tokens for one in drawn])
    num_drawn = sum(int(one.statistics.num_drawn.sum()) for one in drawn)
    num_passes = sum(int(one.statistics.row_passes.sum()) for one in drawn)
    variations = [] if rule.rule.is_lossless else _variations(subject, decoding)
    return Row(
        drafter=drafter.name,
        tree=drafter.tree,
        network=drafter.network,
        num_parameters=drafter.num_parameters,
        rule=rule.name,
        is_lossless=rule.rule.is_lossless,
        tokens_per_pass=num_drawn / num_passes,
        passes_saved=1 - num_passes / num_drawn,
        laws=subject.check_laws(tokens),
        mean_variation=sum(variations) / len(variations) if variations else None,
        largest_variation=max(variations, default=None),
        quality=None if judge is None else judge(subject, tokens, title),
        timings=[_time(subject, decoding, batch_size, protocol) for batch_size in protocol.batch_sizes],
    )


def _variations(subject: Subject, decoding: SpeculativeDecoding) -> list[float]:
    """At nodes spread evenly over those that a relaxed rule meets in some images."""
    rule: Any = decoding.rule
    watched = WatchedRule(rule)
    subject.speculate(range(min(NUM_WATCHED, len(subject))), SpeculativeDecoding(decoding.drafter, watched))
    step = max(1, len(watched.nodes) // NUM_NODES)
    return [variation(rule, target, proposals) for target, proposals in watched.nodes[::step]]


def _time(subject: Subject, decoding: SpeculativeDecoding, batch_size: int, protocol: Protocol) -> Timing:
    """Draw the first images in batches, after one batch of each kind that does not count."""
    parts = subject.batches(protocol.num_timed, batch_size)
    statistics: list[SpeculationStatistics] = []

    def speculative() -> None:
        statistics[:] = [subject.speculate(part, decoding).statistics for part in parts]

    def plain() -> None:
        for part in parts:
            subject.plain(part)

    for warm_up in (partial(subject.speculate, parts[0], decoding), partial(subject.plain, parts[0])):
        warm_up()
    spent, plain_spent = median_seconds([speculative, plain], protocol.repeats, subject.model.device)
    return Timing(
        batch_size=batch_size,
        seconds=spent / protocol.num_timed,
        plain_seconds=plain_spent / protocol.num_timed,
        speed_up=plain_spent / spent,
        target_passes=sum(one.target_passes for one in statistics) / len(parts),
        draft_passes=sum(one.draft_passes for one in statistics) / len(parts),
    )
