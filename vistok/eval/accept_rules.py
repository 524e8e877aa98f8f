"""Accept rules at a single node, exactly: `python -m vistok.eval.accept_rules -o FOLDER`.

Random targets, drafts and codes of a small vocabulary, for which all that can be drafted is listed and nothing is drawn:
how often each lossless rule accepts one of k proposals beside the best that any lossless rule can do, and how far LANTERN
moves the token that comes out, as a function of its k and delta. Writes `accept-rules.json` and `report.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import vistok
from vistok.decoding.speculative.accept import JudgingRule
from vistok.decoding.speculative.laws import Drafts, all_drafts, lantern_deviation, node_law
from vistok.decoding.speculative.neighbours import NeighbourTable
from vistok.decoding.speculative.spectr import SpecTrRule
from vistok.decoding.speculative.strict import StrictRule
from vistok.decoding.speculative.transport import best_acceptance
from vistok.eval.markdown import table
from vistok.files import atomic_path

CODEBOOK_DIM = 2
SHARPNESS, LIKENESS = 1.5, 0.7  # of the logits, and how much the draft's share with the target's
KS, DELTAS = (1, 5), (0.1, 0.4, 5.0)
MODES = ("default", "official")


@dataclass(frozen=True)
class Node:
    """What a rule is asked at one node.

    Args:
        target, draft: `[v]` probabilities.
        codebook: `[v c]`.
    """

    target: Tensor
    draft: Tensor
    codebook: Tensor

    @classmethod
    def random(cls, seed: int, codebook_size: int) -> Node:
        """A node that its seed decides."""
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = torch.randn(2, codebook_size, generator=generator)
        target = (SHARPNESS * ours).softmax(dim=0)
        mixed = LIKENESS * ours + (1 - LIKENESS**2) ** 0.5 * theirs
        codebook = torch.randn(codebook_size, CODEBOOK_DIM, generator=generator)
        return cls(target, (SHARPNESS * mixed).softmax(dim=0), codebook)

    def likeliest(self, num_drafts: int) -> Drafts:
        """The draft's most probable tokens, which are no draws."""
        return Drafts.certain(self.draft.topk(num_drafts).indices)


@dataclass(frozen=True)
class Acceptance:
    """How often one of so many proposals is accepted; means over nodes."""

    num_drafts: int
    likeliest: float
    without_replacement: float
    best_without_replacement: float
    with_replacement: float
    spectr: float
    best_with_replacement: float


@dataclass(frozen=True)
class LanternRow:
    """What LANTERN gains and costs with two proposals; means over nodes."""

    proposals: str
    mode: str
    k: int
    delta: float
    acceptance: float
    total_variation: float  # of the token that comes out, from the target
    largest_total_variation: float


@dataclass(frozen=True)
class Report:
    """Both tables."""

    acceptances: list[Acceptance]
    lantern: list[LanternRow]
    codebook_size: int
    num_nodes: int
    vistok: str


def measure_acceptance(nodes: Sequence[Node], num_drafts: int) -> Acceptance:
    """All rules with `num_drafts` proposals."""

    def mean(measure: Callable[[Node], float]) -> float:
        return fmean(measure(node) for node in nodes)

    def of(rule: JudgingRule, drafts: Callable[[Node], Drafts]) -> float:
        return mean(lambda node: node_law(rule, node.target, drafts(node)).acceptance)

    def drawn(node: Node, *, again: bool) -> Drafts:
        return all_drafts(node.draft, num_drafts, with_replacement=again)

    def best(node: Node, *, again: bool) -> float:
        return best_acceptance(node.target, node.draft, num_drafts, with_replacement=again)

    return Acceptance(
        num_drafts=num_drafts,
        likeliest=of(StrictRule(), lambda node: node.likeliest(num_drafts)),
        without_replacement=of(StrictRule(), lambda node: drawn(node, again=False)),
        best_without_replacement=mean(lambda node: best(node, again=False)),
        with_replacement=of(StrictRule(), lambda node: drawn(node, again=True)),
        spectr=of(SpecTrRule(), lambda node: drawn(node, again=True)),
        best_with_replacement=mean(lambda node: best(node, again=True)),
    )


def measure_lantern(nodes: Sequence[Node], num_drafts: int = 2) -> Iterator[LanternRow]:
    """LANTERN in both modes, with proposals of both kinds."""
    kinds: dict[str, Callable[[Node], Drafts]] = {
        "likeliest": lambda node: node.likeliest(num_drafts),
        "drawn": lambda node: all_drafts(node.draft, num_drafts, with_replacement=False),
    }
    for kind, drafts in kinds.items():
        for mode in MODES:
            found = [
                lantern_deviation(
                    NeighbourTable.build(node.codebook, len(node.codebook) - 1),
                    node.target,
                    drafts(node),
                    KS,
                    DELTAS,
                    mode,  # type: ignore[arg-type]
                )
                for node in nodes
            ]
            for rows in zip(*found, strict=True):  # the same k and delta at all nodes
                variations = [row.total_variation for row in rows]
                accepted = fmean(row.acceptance for row in rows)
                k, delta = rows[0].k, rows[0].delta
                yield LanternRow(kind, mode, k, delta, accepted, fmean(variations), max(variations))


def write_report(report: Report, folder: Path) -> None:
    """Write `accept-rules.json` and `report.md` into an existing folder."""
    with atomic_path(folder / "accept-rules.json") as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.md") as file:
        file.write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    header = ["Proposals", "Likeliest", "Drawn without replacement", "Best possible"]
    header += ["Drawn with replacement", "SpecTr", "Best possible"]
    acceptances = (
        [str(row.num_drafts), *(f"{value:.3f}" for value in list(asdict(row).values())[1:])]
        for row in report.acceptances
    )
    lantern_header = ["Proposals", "Mode", "k", "δ, or λ above 1", "Accepted", "Total variation", "Largest"]
    lantern = (
        [row.proposals, row.mode, str(row.k), f"{row.delta:g}"]
        + [f"{value:.3f}" for value in (row.acceptance, row.total_variation, row.largest_total_variation)]
        for row in report.lantern
    )
    lines = [
        "# Accept rules at a single node",
        "",
        "How often one of several proposals is accepted:",
        "",
        *table(header, acceptances),
        "",
        "What LANTERN gains and costs with two proposals:",
        "",
        *table(lantern_header, lantern, num_labels=2),
        "",
        f"- Means over {report.num_nodes} random nodes with {report.codebook_size} tokens; all that can be drafted is "
        f"listed, so that there is no sampling error. `{Path(__file__).stem}.py` says how targets and drafts come about.",
        "- All rules of the first table but the best possible are `StrictRule`, or `SpecTrRule`; they are lossless. The best "
        "possible is a linear program (optimal transport).",
        "- Total variation: between the token that comes out and the target. It is not bounded by δ: a rejection "
        f"moves mass as well. vistok {report.vistok}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.accept_rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--num-nodes", type=int, default=10)
    parser.add_argument("--codebook-size", type=int, default=12)
    parser.add_argument("--num-drafts", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    nodes = [Node.random(seed, options.codebook_size) for seed in range(options.num_nodes)]
    report = Report(
        acceptances=[measure_acceptance(nodes, count) for count in options.num_drafts],
        lantern=list(measure_lantern(nodes)),
        codebook_size=options.codebook_size,
        num_nodes=len(nodes),
        vistok=vistok.__version__,
    )
    write_report(report, options.out)
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
