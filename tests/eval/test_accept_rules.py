from __future__ import annotations

import json

from vistok.eval.accept_rules import Node, main, measure_acceptance


def test_the_report_has_no_rule_that_beats_the_best(tmp_path, capsys):
    main(["-o", str(tmp_path), "--num-nodes", "2", "--codebook-size", "6", "--num-drafts", "1", "2"])
    report = json.loads(capsys.readouterr().out)
    one, two = report["acceptances"]
    assert one["without_replacement"] > one["likeliest"]
    for row in (one, two):
        assert row["without_replacement"] <= row["best_without_replacement"] + 1e-6
        assert row["with_replacement"] <= row["spectr"] + 1e-6 <= row["best_with_replacement"] + 2e-6
    assert two["best_with_replacement"] > one["best_with_replacement"]
    assert all(row["total_variation"] <= row["largest_total_variation"] for row in report["lantern"])
    assert max(row["total_variation"] for row in report["lantern"]) > 0.05
    assert "| drawn | official | 5 | 0.4 |" in (tmp_path / "report.md").read_text()


def test_one_draw_is_accepted_as_often_as_the_laws_overlap():
    node = Node.random(3, 8)
    row = measure_acceptance([node], 1)
    overlap = float(node.target.minimum(node.draft).sum())
    assert abs(row.without_replacement - overlap) < 1e-6 and abs(row.best_with_replacement - overlap) < 1e-6
