"""The smallest pipeline that does everything: 16 px, 6 tokens of 20 codes, prompts of at most 16 bytes."""

from __future__ import annotations

from pathlib import Path

import torch

import vistok

TOKENIZER = {
    "image_size": 16,
    "num_tokens": 6,
    "levels": (5, 4),
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "num_heads": 2,
    "conv_dim": 8,
    "conv_depth": 1,
}
GENERATOR = {
    "codebook_size": 20,
    "num_tokens": 6,
    "text_length": 16,
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 16,
}


def save_tiny_pipeline(folder: Path, seed: int) -> Path:
    """A pipeline with random weights, saved to `folder`."""
    torch.manual_seed(seed)
    pipeline = vistok.TextToImagePipeline(
        vistok.ConvTiTok(**TOKENIZER), vistok.TextAR(**GENERATOR), guidance_scale=2.0, top_p=0.9
    )
    pipeline.save_pretrained(folder)
    return folder
