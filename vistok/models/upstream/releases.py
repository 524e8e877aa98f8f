"""Every published checkpoint we can load: where it lies, what it is, and the figures its authors give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistok.models import upstream
from vistok.models.upstream.keys import mismatches

HUB_FILES = ("model.safetensors", "config.json")


@dataclass(frozen=True)
class Release:
    """One published checkpoint."""

    name: str
    system: str  # of `upstream.SYSTEMS`
    hub_id: str
    files: tuple[str, ...]  # weights, then the configuration if there is one
    params: int
    size_mb: int | None  # of the weights file, in units of 10^6 bytes; None: not published
    config: Mapping[str, Any] | None  # for `upstream.load`; None: only the second of `files` tells it
    licence: str = "Apache-2.0"
    metrics: Mapping[str, float] = field(default_factory=dict)  # as published; not measured by us
    sampling: Mapping[str, Any] | None = (
        None  # published settings of a generator, in the published names and scales
    )
    tokenizer: str | None = None  # name of the release whose tokens a generator makes
    is_config_in_file: bool = False  # the weights file carries the whole configuration; `config` tells shapes

    def complete_config(self) -> Mapping[str, Any]:
        """`config`, where that is enough to load weights whose file carries none.

        Raises:
            ValueError: it is not.
        """
        if self.config is None:
            raise ValueError(
                f"weights of {self.name} need their official {self.files[1]}: put it beside them and name the folder, or "
                "pass it to `vistok convert`"
            )
        if self.is_config_in_file:
            raise ValueError(
                f"weights of {self.name} need the configuration that their official file carries in its header, and this "
                "file does not: put the official config.json beside it and name the folder, or pass it to `vistok convert`"
            )
        return self.config


def matching_releases(weights: Mapping[str, Tensor]) -> list[Release]:
    """The releases whose keys and shapes are those of `weights`: usually one, but some generators share a shape."""
    matching = []
    for system in upstream.SYSTEMS:
        ours = upstream.translate_weights(system, weights)
        params = sum(tensor.numel() for tensor in ours.values())
        of_this_size = (r for r in RELEASES.values() if (r.system, r.params) == (system, params))
        matching += [release for release in of_this_size if _fits(release, ours)]
    return matching


def _fits(release: Release, weights: Mapping[str, Tensor]) -> bool:
    if release.config is None:
        return False
    with torch.device("meta"):
        model = upstream.build_model(release.system, release.config)
    return not mismatches(model, weights)


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

# Yu et al. 2024, Miwa et al. 2025 and their release notes: gFID of 50,000 images against the ADM reference at 256 px

BERT = {"model_type": "ViT", "hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 3072}
UVIT = {"model_type": "UViT", "hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096}


def _maskgit(
    tokenizer: str,
    hub_id: str,
    files: tuple[str, ...],
    sizes: Mapping[str, Any],
    *,
    num_tokens: int,
    params: int,
    gfid: float,
    sampling: Mapping[str, Any],
) -> Release:
    vocabulary = {"codebook_size": 4096, "condition_num_classes": 1000, "image_seq_len": num_tokens}
    return Release(
        f"maskgit-{tokenizer}",
        system="maskgit",
        hub_id=hub_id,
        files=files,
        params=params,
        size_mb=round(params * 4e-6),
        config={**vocabulary, **sizes, "num_attention_heads": 16},
        metrics={"gFID (ImageNet-1k, 256 px, 50,000 samples, published)": gfid},
        sampling=sampling,
        tokenizer=tokenizer,
    )


def _titok_generator(tokenizer: str, hub_name: str, sizes: Mapping[str, Any], **entries: Any) -> Release:
    return _maskgit(tokenizer, f"yucornetto/generator_{hub_name}_imagenet", HUB_FILES, sizes, **entries)


def _one_d_piece_generator(letter: str, scale: float, temperature: float, gfid: float) -> Release:
    return _maskgit(
        f"one-d-piece-{letter}-256",
        f"turing-motors/MaskGIT_One-D-Piece-{letter.upper()}-256",
        ("pytorch_model.bin",),
        BERT,
        num_tokens=256,
        params=177_374_464,
        gfid=gfid,
        # annealing is not stated for these; off is what the release does when nothing is given
        sampling=_sampling(16, scale, "power-cosine", temperature, annealing=False),
    )


def _sampling(
    steps: int, scale: float, schedule: str, temperature: float, *, annealing: bool = True
) -> dict[str, Any]:
    return {
        "num_sample_steps": steps,
        "guidance_scale": scale,
        "guidance_decay": schedule,
        "guidance_scale_pow": 3.0,
        "randomize_temperature": temperature,
        "softmax_temperature_annealing": annealing,
    }


MASKGIT = [
    _titok_generator(
        "titok-l-32",
        "titok_l32",
        BERT,
        num_tokens=32,
        params=177_202_432,
        gfid=2.77,
        sampling=_sampling(8, 4.5, "linear", 9.5),
    ),
    _titok_generator(
        "titok-b-64",
        "titok_b64",
        BERT,
        num_tokens=64,
        params=177_227_008,
        gfid=2.48,
        sampling=_sampling(8, 3.0, "linear", 11.0),
    ),
    _titok_generator(
        "titok-s-128",
        "titok_s128",
        UVIT,
        num_tokens=128,
        params=294_990_848,
        gfid=1.97,
        sampling=_sampling(64, 6.9, "power-cosine", 2.8),
    ),
    _one_d_piece_generator("s", scale=12.5, temperature=3.0, gfid=2.67),
    _one_d_piece_generator("b", scale=8.5, temperature=2.5, gfid=2.70),
    _one_d_piece_generator("l", scale=5.5, temperature=3.0, gfid=2.35),
]

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

RELEASES: dict[str, Release] = {
    release.name: release for release in [*TITOK, MASKGIT_VQGAN, *ONE_D_PIECE, *MASKGIT, *FLEXTOK, *FLEX_AR]
}
