"""The published FlexTok tokenizers, their VAEs, and the FlexAR generators over FlexTok's tokens."""

from __future__ import annotations

from vistok.models.upstream.releases.release import HUB_FILES, Release

# Bachmann et al. 2025 and papers that cite them: rFID on ImageNet-1k validation images at 256 px

FLEXTOK_LICENCE = "Apple-AMLR"  # weights for research only


def _flextok(encoder: int, decoder: int, data: str, *, params: int, rfid: float | None = None) -> Release:
    sizes = {
        "enc_dim": 64 * encoder,
        "enc_depth": encoder,
        "dec_dim": 64 * decoder,
        "dec_depth": decoder,
    }
    return Release(
        f"flextok-d{encoder}-d{decoder}-{data}",
        system="flextok",
        hub_id=f"EPFL-VILAB/flextok_d{encoder}_d{decoder}_{data}",
        files=HUB_FILES,
        params=params,
        size_mb=round(params * 4e-6),
        config={**sizes, "num_registers": 256, "latent_channels": 16},
        licence=FLEXTOK_LICENCE,
        metrics={} if rfid is None else {"rFID (ImageNet-1k val, 256 px, published)": rfid},
        sampling={"timesteps": 20, "guidance_scale": 7.5, "perform_norm_guidance": True},
        is_config_in_file=True,
    )


def _flextok_vae(channels: int, params: int) -> Release:
    return Release(
        f"flextok-vae-c{channels}",
        system="flextok_vae",
        hub_id=f"EPFL-VILAB/flextok_vae_c{channels}",
        files=("diffusion_pytorch_model.safetensors", "config.json"),
        params=params,
        size_mb=round(params * 4e-6),
        config={"latent_channels": channels},
        licence=FLEXTOK_LICENCE,
    )


FLEXTOK = [
    _flextok(12, 12, "in1k", params=341_651_737, rfid=4.20),
    _flextok(18, 18, "in1k", params=949_734_553, rfid=1.61),
    _flextok(18, 28, "in1k", params=2_540_882_841, rfid=1.45),
    _flextok(18, 28, "dfn", params=2_540_882_841),
    _flextok_vae(4, 83_653_863),
    _flextok_vae(8, 83_709_419),
    _flextok_vae(16, 83_821_011),
]

# The code of the search-over-tokens release. Parameters as published: those of the blocks, without the token tables.
# Sizes and options are read from the published config.yaml, and so is the tokenizer where it names one. GridAR-3B is not
# listed: its grid tokenizer is not FlexTok.


def _flex_ar(size: str, task: str, params: int, *, scale: float, tokenizer: str) -> Release:
    return Release(
        f"flexar-{size.lower()}-{task}",
        system="flextok_ar",
        hub_id=f"EPFL-VILAB/FlexAR-{size}-{task.upper()}",
        files=("model.safetensors", "config.yaml"),
        params=params,
        size_mb=None,
        config=None,
        sampling={"sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.0, "cfg_factor": scale},
        tokenizer=tokenizer,
    )


FLEX_AR = [
    _flex_ar("113M", "t2i", 113_000_000, scale=3.0, tokenizer="flextok-d18-d28-dfn"),
    _flex_ar("382M", "t2i", 382_000_000, scale=3.0, tokenizer="flextok-d18-d28-dfn"),
    _flex_ar("1B", "t2i", 1_150_000_000, scale=3.0, tokenizer="flextok-d18-d28-dfn"),
    _flex_ar("3B", "t2i", 3_060_000_000, scale=3.0, tokenizer="flextok-d18-d28-dfn"),
    _flex_ar("1B", "c2i", 1_150_000_000, scale=1.5, tokenizer="flextok-d18-d28-in1k"),
]
