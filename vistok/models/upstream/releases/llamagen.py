"""The published LlamaGen tokenizers and generators (Sun et al. 2024, "Autoregressive Model Beats Diffusion")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.models.generators.llamagen import PRESETS
from vistok.models.upstream.releases.release import CODE_LICENCE, Release

CLASS_HUB, TEXT_HUB = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
CODEBOOK_SIZE = 16384

# Tokenizers. One file serves every image size: the grid of tokens follows the size. Figures of the release notes, on
# the 50,000 ImageNet-1k validation images; reconstructions at 384 px are resized to 256 px.

VQ_16 = {"ch_mult": (1, 1, 2, 2, 4), "params": 71_883_403}
VQ_8 = {"ch_mult": (1, 2, 2, 4), "params": 70_109_835}


def _tokenizer(
    name: str,
    hub_id: str,
    file: str,
    kind: Mapping[str, Any],
    *,
    image_size: int,
    licence: str = "MIT",
    metrics: Mapping[str, float] | None = None,
) -> Release:
    config = {
        "image_size": image_size,
        "ch": 128,
        "ch_mult": kind["ch_mult"],
        "num_res_blocks": 2,
        "z_channels": 256,
        "codebook_size": CODEBOOK_SIZE,
        "codebook_embed_dim": 8,
        "codebook_l2_norm": True,
        "codebook_show_usage": True,
        "commit_loss_beta": 0.25,
        "entropy_loss_ratio": 0.0,
    }
    return Release(
        name,
        system="llamagen_vq",
        hub_id=hub_id,
        files=(file,),
        params=kind["params"],
        size_mb=round(kind["params"] * 4e-6),
        config=config,
        licence=licence,
        metrics=metrics or {},
    )


def _text_tokenizer(image_size: int) -> Release:
    name = f"llamagen-vq-16-t2i-{image_size}"
    return _tokenizer(name, TEXT_HUB, "vq_ds16_t2i.pt", VQ_16, image_size=image_size, licence=CODE_LICENCE)


def _reconstruction(size: str, rfid: float, psnr: float, ssim: float) -> dict[str, float]:
    return {f"rFID (ImageNet-1k val, {size}, published)": rfid, "PSNR": psnr, "SSIM": ssim}


LLAMAGEN_VQ = [
    _tokenizer(
        "llamagen-vq-16",
        CLASS_HUB,
        "vq_ds16_c2i.pt",
        VQ_16,
        image_size=256,
        metrics=_reconstruction("256 px", 2.19, 20.79, 0.675),
    ),
    _tokenizer(
        "llamagen-vq-16-384",
        CLASS_HUB,
        "vq_ds16_c2i.pt",
        VQ_16,
        image_size=384,
        metrics=_reconstruction("384 px resized to 256 px", 0.94, 21.94, 0.726),
    ),
    _tokenizer(
        "llamagen-vq-8",
        CLASS_HUB,
        "vq_ds8_c2i.pt",
        VQ_8,
        image_size=256,
        metrics=_reconstruction("256 px", 0.59, 24.45, 0.813),
    ),
    _text_tokenizer(256),
    _text_tokenizer(512),
]

# Generators


def class_config(sizes: Mapping[str, int], grid: int) -> dict[str, Any]:
    """The official settings of a generator from classes of ImageNet to `grid` x `grid` tokens; `sizes` of a preset."""
    return _config(sizes, grid) | {"model_type": "c2i", "cls_token_num": 1, "num_classes": 1000}


def text_config(sizes: Mapping[str, int], grid: int) -> dict[str, Any]:
    """The official settings of a generator from features of flan-t5-xl to `grid` x `grid` tokens."""
    return _config(sizes, grid) | {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048}


def _config(sizes: Mapping[str, int], grid: int) -> dict[str, Any]:
    return {
        "dim": sizes["dim"],
        "n_layer": sizes["depth"],
        "n_head": sizes["num_heads"],
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "rope_base": 10000,
        "vocab_size": CODEBOOK_SIZE,
        "block_size": grid * grid,
    }


def sampling(scale: float, top_k: int = 0) -> dict[str, Any]:
    """Published sampling settings: guided always, and `top_k` 0 for all tokens."""
    return {"cfg_scale": scale, "cfg_interval": -1, "temperature": 1.0, "top_k": top_k, "top_p": 1.0}


def quality(
    scale: float, figures: tuple[float, float, float, float], size: str = "256 px"
) -> dict[str, float]:
    """Published figures of 50,000 images from classes, by the ADM evaluator: gFID, IS, precision, recall."""
    gfid = f"gFID (ImageNet-1k, {size}, 50,000 samples, cfg {scale}, published)"
    return dict(zip((gfid, "IS", "precision", "recall"), figures, strict=True))


def _class_generator(
    size: str, image_size: int, *, params: int, scale: float, metrics: Mapping[str, float]
) -> Release:
    return Release(
        f"llamagen-{size.lower()}-{image_size}",
        system="llamagen",
        hub_id=CLASS_HUB,
        files=(f"c2i_{size}_{image_size}.pt",),
        params=params,
        size_mb=round(params * 4e-6),
        config=class_config(PRESETS[size], image_size // 16),
        licence="MIT",
        metrics=metrics,
        sampling=sampling(scale),
        tokenizer="llamagen-vq-16" if image_size == 256 else f"llamagen-vq-16-{image_size}",
    )


def _text_generator(file: str, image_size: int) -> Release:
    return Release(
        f"llamagen-xl-t2i-{image_size}",
        system="llamagen",
        hub_id=TEXT_HUB,
        files=(file,),
        params=777_678_080,
        size_mb=3111,
        config=text_config(PRESETS["XL"], image_size // 16),
        licence=CODE_LICENCE,
        # of demo and evaluation alike
        sampling=sampling(7.5, top_k=1000),
        tokenizer=f"llamagen-vq-16-t2i-{image_size}",
    )


def _resized(scale: float, *figures: float) -> dict[str, float]:
    gfid, inception, precision, recall = figures
    return quality(scale, (gfid, inception, precision, recall), "384 px resized to 256 px")


# Scales of classes are those that the authors recommend for the Fréchet distance: at 384 px those of their
# instructions, at 256 px those of the paper's best figures. Their demos draw crisper and less varied images instead,
# with a scale of 4.0 and top_k 2000 (on the web 4000).
LLAMAGEN = [
    _class_generator(
        "B", 256, params=110_888_448, scale=2.0, metrics=quality(2.0, (5.464, 193.613, 0.839, 0.457))
    ),
    _class_generator(
        "B", 384, params=110_888_448, scale=2.0, metrics=_resized(2.25, 6.092, 182.538, 0.845, 0.416)
    ),
    _class_generator(
        "L", 256, params=342_910_976, scale=1.75, metrics=quality(1.75, (3.805, 248.280, 0.833, 0.515))
    ),
    _class_generator(
        "L", 384, params=342_910_976, scale=2.0, metrics=_resized(2.0, 3.075, 256.067, 0.832, 0.522)
    ),
    _class_generator(
        "XL", 384, params=774_699_520, scale=1.75, metrics=_resized(1.75, 2.629, 244.085, 0.807, 0.579)
    ),
    _class_generator(
        "XXL", 384, params=1_410_972_672, scale=1.75, metrics=_resized(1.75, 2.340, 253.906, 0.809, 0.596)
    ),
    _class_generator(
        "3B", 384, params=3_096_659_200, scale=1.65, metrics=_resized(1.65, 2.189, 263.334, 0.819, 0.581)
    ),
    _text_generator("t2i_XL_stage1_256.pt", 256),
    _text_generator("t2i_XL_stage2_512.pt", 512),
]
