"""The published tokenizers with TiTok's transformers: TiTok, MaskGIT-VQGAN, One-D-Piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.models.upstream.releases.release import HUB_FILES, Release

# Yu et al. 2024 and the release notes: rFID on the 50,000 ImageNet-1k validation images at 256 px


def _titok(
    name: str,
    hub_name: str,
    encoder: str,
    decoder: str,
    *,
    params: int,
    rfid: float,
    vq_model: Mapping[str, Any],
) -> Release:
    sizes = {"vit_enc_model_size": encoder, "vit_dec_model_size": decoder}
    patches = {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16}
    return Release(
        name,
        system="titok",
        hub_id=f"yucornetto/tokenizer_{hub_name}_imagenet",
        files=HUB_FILES,
        params=params,
        size_mb=round(params * 4e-6),
        config={
            "model": {"vq_model": {**sizes, **patches, **vq_model}},
            "dataset": {"preprocessing": {"crop_size": 256}},
        },
        metrics={"rFID (ImageNet-1k val, 256 px, published)": rfid},
    )


def _two_stage(num_tokens: int) -> dict[str, Any]:
    codes = {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25}
    kind = {"quantize_mode": "vq", "is_legacy": True, "finetune_decoder": True}
    return {"num_latent_tokens": num_tokens, **codes, **kind}


def _single_stage(num_tokens: int) -> dict[str, Any]:
    codes = {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "commitment_cost": 0.25}
    kind = {"quantize_mode": "vq", "is_legacy": False, "finetune_decoder": False}
    return {"num_latent_tokens": num_tokens, **codes, **kind}


def _vae(num_tokens: int) -> dict[str, Any]:
    kind = {"quantize_mode": "vae", "is_legacy": False, "finetune_decoder": False}
    return {"num_latent_tokens": num_tokens, "token_size": 16, **kind}


S, B, L = "small", "base", "large"
TITOK = [
    _titok("titok-l-32", "titok_l32", L, L, params=641_054_735, rfid=2.21, vq_model=_two_stage(32)),
    _titok("titok-b-64", "titok_b64", B, B, params=204_814_095, rfid=1.70, vq_model=_two_stage(64)),
    _titok("titok-s-128", "titok_s128", S, S, params=83_674_639, rfid=1.71, vq_model=_two_stage(128)),
    _titok(
        "titok-bl-64-vq8k", "titok_bl64_vq8k", B, L, params=390_016_148, rfid=2.06, vq_model=_single_stage(64)
    ),
    _titok(
        "titok-bl-128-vq8k",
        "titok_bl128_vq8k",
        B,
        L,
        params=390_179_988,
        rfid=1.49,
        vq_model=_single_stage(128),
    ),
    _titok(
        "titok-sl-256-vq8k",
        "titok_sl256_vq8k",
        S,
        L,
        params=330_260_884,
        rfid=1.03,
        vq_model=_single_stage(256),
    ),
    _titok(
        "titok-ll-32-vae-c16", "titok_ll32_vae_c16", L, L, params=606_879_604, rfid=1.61, vq_model=_vae(32)
    ),
    _titok(
        "titok-bl-64-vae-c16", "titok_bl64_vae_c16", B, L, params=389_418_100, rfid=1.25, vq_model=_vae(64)
    ),
    _titok(
        "titok-bl-128-vae-c16", "titok_bl128_vae_c16", B, L, params=389_581_940, rfid=0.84, vq_model=_vae(128)
    ),
]

MASKGIT_VQGAN = Release(
    "maskgit-vqgan-imagenet-f16-256",
    system="maskgit_vqgan",
    hub_id="fun-research/TiTok",
    files=("maskgit-vqgan-imagenet-f16-256.bin",),
    params=54_515_587,
    size_mb=218,
    config={
        "num_embeddings": 1024,
        "embedding_dim": 256,
        "commitment_cost": 0.25,
        "autoencoder": {
            "resolution": 256,
            "num_channels": 3,
            "hidden_channels": 128,
            "channel_mult": (1, 1, 2, 2, 4),
            "num_res_blocks": 2,
            "z_channels": 256,
        },
    },
)

# Miwa et al. 2025, release notes: rFID with all 256 tokens, measured as for TiTok


def _one_d_piece(letter: str, size: str, params: int, rfid: float) -> Release:
    sizes = {"vit_enc_model_size": size, "vit_dec_model_size": size}
    patches = {"vit_enc_patch_size": 16, "vit_dec_patch_size": 16}
    vq_model = {**sizes, **patches, **_two_stage(256), "strict_length_assertion": False}
    return Release(
        f"one-d-piece-{letter}-256",
        system="one_d_piece",
        hub_id=f"turing-motors/One-D-Piece-{letter.upper()}-256",
        files=("pytorch_model.bin",),
        params=params,
        size_mb=round(params * 4e-6),
        config={"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": 256}}},
        metrics={"rFID (ImageNet-1k val, 256 px, 256 tokens, published)": rfid},
    )


ONE_D_PIECE = [
    _one_d_piece("s", S, params=83_871_247, rfid=1.48),
    _one_d_piece("b", B, params=205_256_463, rfid=1.11),
    _one_d_piece("l", L, params=641_742_863, rfid=1.08),
]
