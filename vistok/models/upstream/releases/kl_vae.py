"""The published autoencoder of MAR and xAR."""

from __future__ import annotations

from vistok.models.upstream.releases.release import Release

# The mirror of MAR's weights on the hub. Neither code says how well it reconstructs.
MAR_HUB = "jadechoghari/mar"

KL_16 = Release(
    "kl-16",
    system="kl_vae",
    hub_id=MAR_HUB,
    files=("kl16.safetensors",),
    params=66_456_019,
    size_mb=266,
    config={"resolution": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "embed_dim": 16},
    licence="MIT",
)
