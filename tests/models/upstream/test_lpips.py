"""LPIPS without its weights: what is missing is named, and damaged files are not unpickled."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch

from vistok.models.upstream import lpips
from vistok.models.upstream.lpips import load_lpips

FILES = ("vgg16-397923af.pth", "weights-vgg16-lpips.pth")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Where torch's hub keeps weights, on a machine without network."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_missing_weights_are_named(folder: Path) -> None:
    for file in FILES:
        with pytest.raises(FileNotFoundError, match=f"LPIPS needs {file}.*no network.*Put it at {folder}"):
            load_lpips()
        torch.save({}, folder / file)


def test_a_file_that_is_more_than_weights_is_refused(folder: Path) -> None:
    torch.save({"callback": print}, folder / FILES[0])
    with pytest.raises(ValueError, match="is not a file of plain weights"):
        load_lpips()


def test_images_are_compared_with_8_bits(folder: Path, monkeypatch) -> None:
    for file in FILES:
        torch.save({}, folder / file)
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            seen.extend([one, other])
            return (one - other).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr("torch_fidelity.sample_similarity_lpips.SampleSimilarityLPIPS", Network)
    images = torch.tensor([-1.0, 0.001, 1.002]).expand(2, 3, 1, 3)
    assert lpips.load_lpips()(images, -images).shape == (2,)
    assert seen[0][0, 0, 0].tolist() == [0, 128, 255] and seen[1][0, 0, 0].tolist() == [255, 127, 0]
