"""The published MAR generators (Li et al. 2024, "Autoregressive Image Generation without Vector Quantization")."""

from __future__ import annotations

from vistok.models.generators.mar import PRESETS, SAMPLING
from vistok.models.upstream.releases.kl_vae import KL_16, MAR_HUB
from vistok.models.upstream.releases.release import Release


def _mar(size: str, *, params: int, gfid: float, inception: float) -> Release:
    """The averaged weights, which the published figures were measured with."""
    sizes, sampling = PRESETS[size], SAMPLING[size]
    scale = sampling["guidance_scale"]
    return Release(
        f"mar-{size}",
        system="mar",
        hub_id=MAR_HUB,
        files=(f"mar-{size}.safetensors",),
        params=params,
        size_mb=round(params * 4e-6),
        config={
            "img_size": 256,
            "vae_stride": 16,
            "vae_embed_dim": 16,
            "class_num": 1000,
            "buffer_size": 64,
            "encoder_embed_dim": sizes["dim"],
            "decoder_embed_dim": sizes["dim"],
            "encoder_depth": sizes["encoder_depth"],
            "decoder_depth": sizes["decoder_depth"],
            "encoder_num_heads": sizes["num_heads"],
            "decoder_num_heads": sizes["num_heads"],
            "mlp_ratio": 4,
            "diffloss_w": sizes["denoiser_dim"],
            "diffloss_d": sizes["denoiser_depth"],
        },
        licence="MIT",
        metrics={
            f"gFID (ImageNet-1k, 256 px, 50,000 samples, cfg {scale}, published)": gfid,
            "IS": inception,
        },
        # of the published figures; the demo draws in 64 steps with a constant scale of 4.0
        sampling={
            "num_iter": sampling["num_steps"],
            "num_sampling_steps": sampling["num_inference_steps"],
            "cfg": scale,
            "cfg_schedule": "linear",
            "temperature": 1.0,
        },
        tokenizer=KL_16.name,
    )


MAR = [
    _mar("base", params=207_924_768, gfid=2.31, inception=281.7),
    _mar("large", params=478_326_304, gfid=1.78, inception=296.0),
    _mar("huge", params=942_403_104, gfid=1.55, inception=303.7),
]
