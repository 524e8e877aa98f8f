"""Rate-distortion curves of tiny tokenizers and of classical codecs."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import vistok
from tests.tiny import TOKENIZER
from vistok.eval.classical_codecs import load_codec
from vistok.eval.distances import FeatureDistance
from vistok.eval.image_sources import load_pictures
from vistok.eval.rate_distortion import ClassicalMethod, TokenizerMethod, measure_rate_distortion
from vistok.eval.rate_distortion_report import write_report
from vistok.eval.reconstruction import psnr, ssim
from vistok.eval.sources import to_float, to_uint8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        picture = Image.effect_noise((40, 30), 20 * number + 5).convert("RGB")
        picture.save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def variable() -> vistok.ConvTiTok:
    torch.manual_seed(0)
    return vistok.ConvTiTok(**TOKENIZER).eval()


def test_points_of_a_variable_length_tokenizer(folder: Path, variable):
    method = TokenizerMethod("tiny", variable)
    result = measure_rate_distortion(folder, [method], image_size=16, batch_size=2)
    assert [(point.setting, point.value) for point in result.points] == [
        ("tokens", length) for length in (1, 2, 4, 6)
    ]
    originals = load_pictures(folder, image_size=16)
    with torch.inference_mode():
        tokens = variable.encode(to_float(originals))
    for point in result.points:
        payload = math.ceil(point.value * math.log2(20) / 8)
        assert point.payload_bytes == payload and point.payload_bytes_per_pixel == payload / 256
        with torch.inference_mode():
            decoded = to_uint8(variable.decode(tokens.keep(point.value)))
        assert point.psnr == pytest.approx(psnr(decoded, originals).mean().item())
        assert point.ssim == pytest.approx(ssim(decoded, originals).mean().item())
        files = [
            len(method.codec.pack(tokens[row : row + 1].keep(point.value), (16, 16))) for row in range(5)
        ]
        assert point.file_bytes == sum(files) / 5 > payload
        assert point.file_bytes_per_pixel == point.file_bytes / 256


def test_a_tokenizer_of_fixed_length_is_one_point(folder: Path, tokenizer):
    (point,) = measure_rate_distortion(folder, [TokenizerMethod("patches", tokenizer)], image_size=32).points
    assert (point.value, point.payload_bytes) == (16, 8)  # 16 tokens of 4 bits
    tokenizer.codebook_size = None
    with pytest.raises(ValueError, match="needs a tokenizer with a codebook"):
        TokenizerMethod("continuous", tokenizer)


@pytest.mark.parametrize("lengths", [[0, 1], [7], []])
def test_impossible_lengths(variable, lengths: list[int]):
    with pytest.raises(ValueError, match="ConvTiTok decodes 1 to 6 tokens, not"):
        TokenizerMethod("tiny", variable, lengths)


def test_points_of_a_classical_codec(folder: Path):
    codec = load_codec("jpeg")
    result = measure_rate_distortion(folder, [ClassicalMethod(codec, [10, 90])], image_size=24)
    originals = load_pictures(folder, image_size=24)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in originals]
    for point, quality in zip(result.points, (10, 90), strict=True):
        sizes = [len(codec.compress(picture, quality)) for picture in pictures]
        assert (point.setting, point.value, point.payload_bytes) == ("quality", quality, None)
        assert point.file_bytes == sum(sizes) / 5
        assert point.file_bytes_per_pixel == sum(sizes) / 5 / 24**2
    assert result.points[0].psnr < result.points[1].psnr


def test_batches_do_not_change_the_means(folder: Path, variable, extractor):
    def points(batch_size: int) -> list[dict]:
        methods = [TokenizerMethod("tiny", variable), ClassicalMethod(load_codec("webp"), [50])]
        distances = [FeatureDistance(extractor)]
        result = measure_rate_distortion(folder, methods, distances, image_size=16, batch_size=batch_size)
        return [asdict(point) for point in result.points]

    for one, other in zip(points(5), points(2), strict=True):
        assert one.pop("distances") == pytest.approx(other.pop("distances"), abs=1e-6)
        assert one.pop("method") == other.pop("method") and one.pop("setting") == other.pop("setting")
        assert one.pop("payload_bytes") == other.pop("payload_bytes")
        assert one.pop("payload_bytes_per_pixel") == other.pop("payload_bytes_per_pixel")
        assert one == pytest.approx(other, rel=1e-6)


def test_methods_need_names_of_their_own(folder: Path):
    with pytest.raises(ValueError, match="got none"):
        measure_rate_distortion(folder, [])
    with pytest.raises(ValueError, match="different names, got jpeg, jpeg"):
        measure_rate_distortion(folder, [ClassicalMethod(load_codec("jpeg"))] * 2)


def test_the_report(tokenizer, folder_of, extractor, tmp_path: Path):
    """The stand-in codes these greys exactly, so that its PSNR is infinite, which JSON cannot say."""
    folder = folder_of("greys", [(34, 34, 34), (51, 51, 51)], size=(32, 32))
    methods = [TokenizerMethod("patches", tokenizer), ClassicalMethod(load_codec("jpeg"), [5, 95])]
    distances = [FeatureDistance(extractor)]
    result = measure_rate_distortion(folder, methods, distances, unavailable={"lpips": "no weights"})
    files = write_report(result, tmp_path)
    assert [file.name for file in files] == [
        "rate-distortion.json",
        "rate-distortion.csv",
        "rate-distortion.png",
        "report.md",
    ]
    stored = json.loads(files[0].read_text())
    assert stored["points"] == [asdict(point) for point in result.points]
    assert stored["points"][0]["psnr"] is None and stored["points"][0]["ssim"] == pytest.approx(1)
    assert stored["source"] == "greys" and stored["num_images"] == 2 and stored["image_size"] == [32, 32]
    assert stored["unavailable"] == {"lpips": "no weights"} and "libjpeg" in stored["methods"]["jpeg"]
    with files[1].open() as table:
        rows = list(csv.DictReader(table))
    assert [row["method"] for row in rows] == ["patches", "jpeg", "jpeg"]
    assert float(rows[1]["file_bytes"]) == result.points[1].file_bytes and rows[1]["payload_bytes"] == ""
    assert float(rows[2]["mean-colour"]) == pytest.approx(result.points[2].distances["mean-colour"])
    assert Image.open(files[2]).width > 1500  # three panels
    page = files[3].read_text()
    assert (
        "| patches | tokens 16 |" in page
        and "| exact |" in page
        and "Not measured, lpips: no weights" in page
    )
    assert str(tmp_path) not in page
