"""The benchmark of the continuous generators at tiny sizes, and that it compares equal things."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vistok.eval import continuous_speed, continuous_ways
from vistok.eval.continuous_speed import LARGEST_DIFFERENCE, main, measure, plain_difference, watched
from vistok.eval.continuous_ways import Family, MARFamily, XARFamily, build_family
from vistok.eval.plain_continuous import PlainMAR
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR

SIZES: dict[str, Any] = {"latent_dim": 3, "num_tokens": 16, "layout": "4x4", "num_classes": 5, "dim": 16}
SIZES |= {"encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "mlp_dim": 24}
HEAD = {"num_buffer_tokens": 3, "denoiser_dim": 12, "denoiser_depth": 2}


def tiny_xar() -> Family:
    model = XAR(**SIZES, order="cells-2")
    return XARFamily(loud(model), num_inference_steps=6, annealed=(5, 3))


def tiny_mar() -> Family:
    model, draft = loud(MAR(**SIZES, **HEAD)), loud(MAR(**SIZES | {"encoder_depth": 1}, **HEAD))
    steps = {"num_steps": 6, "num_inference_steps": 4, "published": (8, 5), "published_every": 4}
    return MARFamily(model, draft, annealed=(5, 2), **steps)


def loud(model: Any) -> Any:
    """With weights that make every part of it matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


TINY: dict[str, Callable[[], Family]] = {"xar-b": tiny_xar, "mar-b": tiny_mar}
WAYS = {  # name, steps, and the share that is done
    "xar-b": [("plain", "4 x 6", 2), ("decoding", "4 x 6", 1), ("DiSA", "5 + 4 + 3 + 3", 1)],
    "mar-b": [
        ("plain", "6 x 4", 2),
        ("plain, published steps", "8 x 5", 4),
        ("decoding", "6 x 4", 1),
        ("DiSA", "6 x 5 to 2", 1),
        ("context reuse", "6 x 4", 1),
        ("speculation", "6 x 4", 1),
    ],
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_ways, "FAMILIES", TINY)


@pytest.mark.parametrize("name", TINY)
def test_the_plain_way_draws_what_the_package_draws(name: str) -> None:
    family = build_family(name)
    labels = torch.tensor([3, 1])
    streams = [continuous_ways.ImageStreams.from_seeds([7, 8]) for _ in range(2)]
    plain, own = family.plain_ways(1)[0].draw(labels, streams[0]), family.ways()[0].draw(labels, streams[1])
    assert plain.shape == own.data.shape == (2, 16, 3)
    difference = (own.data - plain).abs().max() / plain.abs().max()
    assert difference < LARGEST_DIFFERENCE and plain_difference(family) < LARGEST_DIFFERENCE
    assert plain.std() > 0.1 and (plain[0] - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", TINY)
def test_measurements(name: str) -> None:
    found = list(
        measure(name, build_family(name), dtypes=["float32", "bfloat16"], batch_sizes=[2], repeats=2, every=2)
    )
    plain = sum(way.startswith("plain") for way, _, _ in WAYS[name])
    expected = [(*way, "float32") for way in WAYS[name]]
    expected += [(*way, "bfloat16") for way in WAYS[name][plain:]]
    assert [(m.way, m.steps, m.every, m.dtype) for m in found] == expected
    for m in found:
        assert list(m.parts) == ["encoder", "decoder", "head"] and min(m.parts.values()) > 0
        assert m.batch_size == 2 and sum(m.parts.values()) < m.seconds_per_image


def test_times_of_a_share_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(continuous_speed.time, "perf_counter", lambda: float(next(clock)))
    family = build_family("mar-b")
    seconds = []
    for every in (1, 2, 3):
        m = next(measure("mar-b", family, dtypes=[], batch_sizes=[1], repeats=1, every=every))
        assert m.parts["encoder"] == m.parts["decoder"] == 6  # a second a call, and a call a step
        seconds.append(m.seconds_per_image)
    assert max(seconds) < 1.1 * min(seconds)


def test_methods_are_watched_for_a_while_only() -> None:
    family = build_family("mar-b")
    assert isinstance(family, MARFamily)
    way = family.ways()[0]
    with pytest.raises(RuntimeError), watched(way.parts):
        assert "encode" in vars(family.model)
        raise RuntimeError
    assert "encode" not in vars(family.model) and "modulate" not in vars(family.model.denoiser)


@pytest.mark.parametrize("name", TINY)
def test_different_tokens_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encode, velocity = PlainMAR.encode, XAR.velocity
    monkeypatch.setattr(PlainMAR, "encode", lambda self, *rest: 1.1 * encode(self, *rest))
    monkeypatch.setattr(  # only the plain way has no cache
        XAR, "velocity", lambda self, *rest: velocity(self, *rest) * (1.1 if len(rest) == 2 else 1)
    )
    with pytest.raises(ValueError, match=rf"{name}: tokens of the plain way and of the package differ by \d"):
        main(["-o", str(tmp_path), "--families", name])


@pytest.mark.parametrize(("name", "steps"), [("xar-b", 6), ("mar-b", 6)])
def test_a_share_that_does_not_divide_the_steps(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps cannot be timed by doing one in 4"):
        build_family(name).plain_ways(4)


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="unknown family 'xar-xxl'; choose from xar-b, mar-b"):
        build_family("xar-xxl")


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-o", str(tmp_path / "speed"), "--every", "2"])
    stored = json.loads((tmp_path / "speed" / "continuous-speed.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    assert stored["parameters"]["mar-b"].keys() == {"MAR", "draft"}
    page = (tmp_path / "speed" / "report.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(("| xar-b", "| mar-b"))]
    assert len(rows) == len(stored["measurements"]) == 3 + 2 + 6 + 4
    plain = {}
    for row, m in zip(rows, stored["measurements"], strict=True):
        family, way, _, dtype, batch, seconds, *shares, speedup, published = row
        assert (family[2:], way, dtype, batch) == (m["family"], m["way"], m["dtype"], "1")
        assert float(seconds) == pytest.approx(m["seconds_per_image"], rel=0.01)
        assert sum(int(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=2)
        plain.setdefault((m["family"], way), m["seconds_per_image"])
        assert float(speedup) == pytest.approx(plain[m["family"], "plain"] / m["seconds_per_image"], abs=0.01)
        assert (published == "- |") is (m["family"] == "xar-b")
    assert stored["machine"] in page and "one in 2 of its steps" in page and "one in 4 of its steps" in page
