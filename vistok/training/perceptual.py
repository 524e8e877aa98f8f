"""A perceptual loss in the manner of LPIPS (Zhang et al. 2018): distance of normalised features of a trained network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.models.upstream import efficientnet_lite


class PerceptualLoss(nn.Module):
    """Squared distance between channel-normalised features of all stages of EfficientNet-Lite1.

    Unlike LPIPS the channels are not weighted by human judgements. The weights come from an installed package.

    Args:
        input_size: images are enlarged to this many pixels per side first, nearer to what the network was trained on.

    Raises:
        ModuleNotFoundError: the package with the network's weights is not installed.
    """

    def __init__(self, input_size: int = 128) -> None:
        super().__init__()
        network = efficientnet_lite.load("lite1").requires_grad_(False)
        self.input_size = input_size
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = network.blocks

    def train(self, mode: bool = True) -> PerceptualLoss:
        """The network always stays in evaluation mode: its statistics are those of ImageNet."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Both `[b 3 H W]` in [-1, 1]; gives a scalar. The gradient reaches `images` only."""
        with torch.no_grad():
            wanted = self._features(targets)
        return torch.stack(
            [
                (mine - theirs).square().sum(dim=1).mean()
                for mine, theirs in zip(self._features(images), wanted, strict=True)
            ]
        ).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        images = F.interpolate(images, size=self.input_size, mode="bilinear", align_corners=False)
        hidden_states = self.stem(images * (127.5 / 128))  # [b c h w]
        features = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            features.append(F.normalize(hidden_states.float(), dim=1))
        return features
