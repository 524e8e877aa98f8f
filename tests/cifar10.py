"""A CIFAR-10 of a few images, and tokenizers for its 32 pixels with 16 tokens, on a grid and in a sequence."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

import vistok

NUM_TOKENS, CODEBOOK_SIZE = 16, 8


def save_tiny_cifar10(folder: Path, num_train: int = 40, num_test: int = 20) -> Path:
    """Tables of noisy images whose brightness tells their class, each class in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        images, labels = [], [i % 10 for i in range(count)]
        for label in labels:
            pixels = 25 * label + random.integers(0, 25, (32, 32, 3))
            file = BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
            images.append({"bytes": file.getvalue(), "path": None})
        parquet.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    return folder


def save_tiny_tokenizer(folder: Path) -> Path:
    """A VQGAN with random weights."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "dim_mults": (1, 1, 1, 1), "depth": 1, "latent_dim": 8, "codebook_dim": 4}
    vistok.VQGAN(image_size=32, codebook_size=CODEBOOK_SIZE, **sizes).save_pretrained(folder)
    return folder


def save_tiny_sequence_tokenizer(folder: Path) -> Path:
    """A ConvTiTok with random weights."""
    torch.manual_seed(0)
    sizes = {
        "dim": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "conv_dim": 8,
        "conv_depth": 1,
    }
    model = vistok.ConvTiTok(image_size=32, num_tokens=NUM_TOKENS, levels=(4, 2), **sizes)
    model.save_pretrained(folder)
    return folder


def save_tiny_kl_tokenizer(folder: Path, latent_channels: int = 2) -> Path:
    """A KLTokenizer with random weights and a scaling factor."""
    torch.manual_seed(0)
    sizes = {"dims": (8, 8, 8, 8), "depth": 1, "num_groups": 4, "mid_attention": False}
    model = vistok.KLTokenizer(image_size=32, latent_channels=latent_channels, scaling_factor=2.5, **sizes)
    model.save_pretrained(folder)
    return folder
