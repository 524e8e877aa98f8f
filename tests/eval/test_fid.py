"""Distances between folders and batches, their protocol, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch

from vistok.eval.fid import compute_fid
from vistok.eval.sources import to_uint8

SPREAD = [(100, 100, 100), (140, 90, 60), (60, 150, 80), (90, 60, 150), (120, 130, 40)]


def shifted(colours, red):
    return [(colour[0] + red, *colour[1:]) for colour in colours]


def test_identical_sets_have_distance_zero(extractor, folder_of):
    result = compute_fid(folder_of("real", SPREAD), folder_of("fake", SPREAD[::-1]), extractor=extractor)
    assert result.fid == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("red", [5, 20])
def test_shifted_set_is_off_by_the_squared_shift(extractor, folder_of, red):
    """Equal covariances leave only the squared difference of the means (Heusel et al. 2017)."""
    result = compute_fid(
        folder_of("real", SPREAD), folder_of("fake", shifted(SPREAD, red)), extractor=extractor
    )
    assert result.fid == pytest.approx(red**2, abs=1e-2)


def test_spread_counts_too(extractor):
    """One feature varies with deviations 10 and 20: the distance is their squared difference (with n - 1)."""

    def greys(deviation):
        images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
        images[0, 0] -= deviation
        images[1, 0] += deviation
        return [images]

    result = compute_fid(greys(10), greys(20), extractor=extractor)
    assert result.fid == pytest.approx(2 * 10**2, rel=1e-4)


def test_kernel_distance_needs_a_hundred_images(extractor):
    random.seed(0)
    images = torch.tensor([[random.randrange(256) for _ in range(3)] for _ in range(120)], dtype=torch.uint8)
    images = images[:, :, None, None].expand(-1, -1, 8, 8)
    assert compute_fid([images[:99]], [images], extractor=extractor).kid is None
    result = compute_fid([images], [images // 2], extractor=extractor, seed=3)
    again = compute_fid([images], [images // 2], extractor=extractor, seed=3)
    assert result.kid_subset_size == 120
    assert result.kid is not None and result.kid > 0 and result.kid == again.kid


def test_a_function_of_batches_is_a_source(extractor, folder_of):
    batch = to_uint8(torch.zeros(4, 3, 16, 16))
    real = folder_of("real", [(128, 128, 128)] * 3)
    result = compute_fid(real, lambda: iter([batch, batch[:1]]), extractor=extractor, fake_name="model")
    assert (result.num_real, result.num_fake, result.fake) == (3, 5, "model")
    assert result.fid == pytest.approx(0, abs=1e-3)


def test_result_carries_its_protocol_as_json(extractor, folder_of):
    real = folder_of("real", SPREAD, size=(16, 16))
    fake = folder_of("fake", SPREAD[:2], size=(24, 12))
    found = json.loads(compute_fid(real, fake, extractor=extractor, seed=7).to_json())
    assert (found["real"], found["fake"], found["seed"]) == ("real", "fake", 7)
    assert (found["extractor"], found["dtype"], found["num_fake"]) == ("mean-colour", "float32", 2)
    assert found["fake_image_size"] == [12, 24]
    assert "2 images are fewer than the 3 features" in found["note"] and "sharpness" in found["note"]
    assert set(found["versions"]) >= {"torch", "torch-fidelity"}


def test_no_note_without_cause(extractor, folder_of):
    result = compute_fid(folder_of("real", SPREAD), folder_of("fake", SPREAD), extractor=extractor)
    assert result.note == ""


def test_sizes_within_a_folder_must_agree_unless_resized(extractor, folder_of):
    mixed = folder_of("mixed", SPREAD)
    folder_of("mixed/larger", SPREAD, size=(32, 20))
    with pytest.raises(ValueError, match=r"larger.*32x20.*16x16.*give an image size"):
        compute_fid(mixed, mixed, extractor=extractor)
    result = compute_fid(mixed, mixed, extractor=extractor, image_size=16)
    assert (result.num_real, result.real_image_size) == (10, (16, 16))


def test_bad_sources(extractor, folder_of, tmp_path):
    good = folder_of("good", SPREAD)
    (tmp_path / "empty").mkdir()
    damaged = folder_of("damaged", SPREAD)
    (damaged / "0000.png").write_bytes((damaged / "0001.png").read_bytes()[:40])
    with pytest.raises(FileNotFoundError, match="missing"):
        compute_fid(good, tmp_path / "missing", extractor=extractor)
    with pytest.raises(ValueError, match="empty holds no images"):
        compute_fid(tmp_path / "empty", good, extractor=extractor)
    with pytest.raises(ValueError, match=r"0000\.png is (damaged|not an image)"):
        compute_fid(good, damaged, extractor=extractor)
    with pytest.raises(ValueError, match="at least 2"):
        compute_fid(good, folder_of("single", SPREAD[:1]), extractor=extractor)
    with pytest.raises(ValueError, match="uint8"):
        compute_fid(good, [torch.zeros(2, 3, 16, 16)], extractor=extractor)
    with pytest.raises(ValueError, match="no images"):
        compute_fid(good, [], extractor=extractor)


def test_rounding_is_to_nearest():
    images = torch.tensor([-1.5, -1, 0.001, 1, 1.5]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_heavy_packages_are_imported_on_use():
    code = "import sys, vistok.eval.fid; sys.exit(bool({'timm', 'torch_fidelity'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
