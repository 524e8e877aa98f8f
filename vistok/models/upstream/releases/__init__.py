"""Every published checkpoint we can load: where it lies, what it is, and the figures its authors give."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vistok.models import upstream
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.releases.flextok import FLEX_AR, FLEXTOK
from vistok.models.upstream.releases.kl_vae import KL_16
from vistok.models.upstream.releases.lantern import LANTERN, LANTERN_DRAFTERS
from vistok.models.upstream.releases.llamagen import LLAMAGEN, LLAMAGEN_VQ
from vistok.models.upstream.releases.mar import MAR
from vistok.models.upstream.releases.maskgit import MASKGIT
from vistok.models.upstream.releases.nar import NAR
from vistok.models.upstream.releases.release import Release
from vistok.models.upstream.releases.titok import MASKGIT_VQGAN, ONE_D_PIECE, TITOK
from vistok.models.upstream.releases.xar import XAR

__all__ = ["RELEASES", "Release", "matching_releases", "possible_releases"]

RELEASES: dict[str, Release] = {
    release.name: release
    for release in [
        *TITOK,
        MASKGIT_VQGAN,
        *ONE_D_PIECE,
        *MASKGIT,
        *FLEXTOK,
        *FLEX_AR,
        *LLAMAGEN_VQ,
        *LLAMAGEN,
        *LANTERN,
        *LANTERN_DRAFTERS,
        *NAR,
        KL_16,
        *MAR,
        *XAR,
    ]
}


def matching_releases(weights: Mapping[str, Tensor]) -> list[Release]:
    """The releases whose keys and shapes are those of `weights`; those of one model for several image sizes share them."""
    matching = []
    for system in upstream.SYSTEMS:
        ours = upstream.translate_weights(system, weights)
        total = sum(tensor.numel() for tensor in ours.values())
        # buffers, which are no parameters, come on top of them
        of_this_size = (
            r for r in RELEASES.values() if r.system == system and r.params <= total <= 1.01 * r.params
        )
        matching += [release for release in of_this_size if _fits(release, ours)]
    return matching


def possible_releases(weights: Mapping[str, Tensor], file_name: str) -> list[Release]:
    """The releases that a file of `weights` can be, told by shapes and then by its name; one if they load as the same."""
    matching = matching_releases(weights)
    possible = [release for release in matching if release.files[0] == file_name] or matching
    are_the_same = all(release.config == possible[0].config for release in possible)
    return possible[:1] if are_the_same else possible


def _fits(release: Release, weights: Mapping[str, Tensor]) -> bool:
    if release.config is None:
        return False
    with torch.device("meta"):
        model = upstream.build_model(release.system, release.config)
    return not mismatches(model, weights)
