"""The published xAR generators (Ren et al. 2025, "Beyond Next-Token: Next-X Prediction")."""

from __future__ import annotations

from vistok.models.generators.xar import PRESETS, SAMPLING
from vistok.models.upstream.releases.kl_vae import KL_16
from vistok.models.upstream.releases.release import Release

LICENCE = "none given"  # neither the code nor the weights' repository has one


def _xar(size: str, *, params: int, gfid: float | None = None) -> Release:
    sizes, sampling = PRESETS[size], SAMPLING[size]
    scale = sampling["guidance_scale"]
    figure = f"gFID (ImageNet-1k, 256 px, 50,000 samples, cfg {scale}, published)"
    return Release(
        f"xar-{size}",
        system="xar",
        hub_id="OliverRen/xAR",
        files=(f"xAR-{size[0].upper()}.pth",),
        params=params,
        size_mb=round(params * 4e-6),
        config={
            "img_size": 256,
            "vae_stride": 16,
            "vae_embed_dim": 16,
            "clusters": 4,
            "encoder_embed_dim": sizes["dim"],
            "decoder_embed_dim": sizes["dim"],
            "encoder_depth": sizes["encoder_depth"],
            "decoder_depth": sizes["decoder_depth"],
            "encoder_num_heads": sizes["num_heads"],
            "decoder_num_heads": sizes["num_heads"],
            "mlp_ratio": 4,
        },
        licence=LICENCE,
        metrics={} if gfid is None else {figure: gfid},
        sampling={"flow_steps": sampling["num_inference_steps"], "cfg": scale},
        tokenizer=KL_16.name,
    )


# Figures are listed where we could check them: of xAR-H in the paper's abstract, of xAR-B in work that cites it.
XAR = [
    _xar("base", params=172_638_224, gfid=1.72),
    _xar("large", params=608_397_968),
    _xar("huge", params=1_186_024_096, gfid=1.24),
]
