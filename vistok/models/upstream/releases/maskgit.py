"""The published MaskGIT generators of TiTok and One-D-Piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.models.upstream.releases.release import HUB_FILES, Release

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
