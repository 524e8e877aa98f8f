"""The measurement of the watermark with a tiny pipeline: what it counts and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vistok
from tests.tiny import save_tiny_pipeline
from vistok.decoding.watermark import Watermark, WatermarkKey, detect
from vistok.eval import watermark as measurement
from vistok.eval.watermark import MarkedImages, drawn_emoji, main, saved
from vistok.tokens import Tokens

NAMES = [f"name {number}" for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "BATCH_SIZE", 4)
    monkeypatch.setattr(measurement, "NUM_NULL_KEYS", 5)


@pytest.fixture
def marked(model: Path, small_batches: None) -> MarkedImages:
    pipeline = vistok.load(model)
    pipeline.set_progress_bar_config(disable=True)
    return MarkedImages(pipeline, NAMES, num_lists=2, green_fraction=0.5)


def test_every_batch_is_drawn_with_a_key_of_its_own(marked: MarkedImages) -> None:
    tokens = marked.draw(30.0)
    for number, rows in enumerate([range(0, 4), range(4, 6)]):
        key = WatermarkKey(f"key {number}", 20, 2, 0.5)
        mark = Watermark.for_seeds(key, list(rows), 30.0)
        prompts = [NAMES[row] for row in rows]
        alone = marked.pipeline(prompts, seed=list(rows), logits_processor=mark, output_type="tokens").images
        assert torch.equal(tokens.data[rows.start : rows.stop], alone.data)
    plain = marked.pipeline(NAMES, seed=list(range(6)), output_type="tokens").images
    assert torch.equal(marked.draw(0.0).data, plain.data)


def test_images_are_looked_at_with_their_own_key(marked: MarkedImages) -> None:
    greens = [
        WatermarkKey(f"key {number}", 20, 2, 0.5).green_lists()[0].nonzero()[:6, 0] for number in (0, 1)
    ]
    tokens = Tokens(indices=torch.stack([greens[0]] * 4 + [greens[1]] * 2), codebook_size=20)
    share, z_score = marked.find(tokens, false_positive_rate=0.05)
    assert share == 1.0 and z_score == pytest.approx(detect(tokens[:1], marked.key("key 0"))[0].z_score)
    swapped = Tokens(indices=tokens.data.flip(0), codebook_size=20)
    assert marked.find(swapped, false_positive_rate=0.05)[0] < 1


def test_false_positives_are_counted_key_by_key(marked: MarkedImages) -> None:
    tokens = Tokens(indices=torch.arange(6)[None] + torch.arange(3)[:, None] * 4, codebook_size=20)
    counted = marked.false_positives("some", tokens, 0.3)
    shares = [
        sum(image.p_value <= 0.3 for image in detect(tokens, marked.key(f"null key {number}"))) / 3
        for number in range(5)
    ]
    assert (counted.images, counted.num_images) == ("some", 3)
    assert counted.mean == pytest.approx(sum(shares) / 5)
    assert (counted.lowest, counted.highest) == (min(shares), max(shares))


def test_a_jpeg_file_changes_pictures_a_little() -> None:
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(saved(images, None), images)
    errors = [(saved(images, quality).float() - images.float()).abs().mean().item() for quality in (95, 30)]
    assert saved(images, 95).dtype == torch.uint8 and 0 < errors[0] < errors[1]


def test_names_are_drawn_once_and_can_be_read(emoji_folder: Path) -> None:
    drawn = drawn_emoji(emoji_folder, 9, text_length=7)
    names = [entry.name for entry in drawn]
    assert len(set(names)) == 9
    assert all(entry.skin_tone == "" for entry in drawn)
    with pytest.raises(ValueError, match="holds 0 names, fewer than the 9"):
        drawn_emoji(emoji_folder, 9, text_length=6)


def test_the_report(small_batches, monkeypatch, model: Path, emoji_folder: Path, extractor, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measurement, "load_extractor", lambda name: extractor)
    out = tmp_path / "report"
    arguments = ["-o", out, "--data", emoji_folder, "--model", model, "--num-images", 6, "--strengths", 0, 30]
    main([str(argument) for argument in arguments])
    stored = json.loads((out / "watermark.json").read_text())
    assert stored == json.loads(capsys.readouterr().out)
    plain, strong = stored["points"]
    assert (plain["strength"], plain["changed_tokens"], plain["psnr"]) == (0, 0, None)
    assert strong["changed_tokens"] > 0 and strong["psnr"] > 0
    assert strong["z_score"]["tokens"] > plain["z_score"]["tokens"]
    assert list(strong["detected"]) == ["tokens", "PNG", "JPEG 90", "JPEG 75"]
    assert all(0 <= share <= 1 for share in stored["kept_tokens"].values())
    assert [counted["num_images"] for counted in stored["false_positives"]] == [6, 6, 6]
    assert (out / "watermark.png").stat().st_size > 1000
    page = (out / "report.md").read_text()
    assert stored["machine"] in page and "| 30 | " in page and "| real | 6 |" in page
