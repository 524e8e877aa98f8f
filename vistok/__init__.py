"""vistok: image tokenizers and autoregressive image generators.

Importing does nothing; every public name is resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "AnyOrderAR": "vistok.models.generators.any_order",
    "AnyOrderMasked": "vistok.models.generators.any_order",
    "ClassToImagePipeline": "vistok.pipelines.class_to_image",
    "ConvTiTok": "vistok.models.tokenizers.conv_titok",
    "EagleDrafter": "vistok.models.drafters.eagle",
    "EarlyExitAdapter": "vistok.models.drafters.early_exit",
    "FlexARClass": "vistok.models.generators.flex_ar",
    "FlexARText": "vistok.models.generators.flex_ar",
    "FlexTok": "vistok.models.tokenizers.flextok",
    "KLTokenizer": "vistok.models.tokenizers.kl",
    "Layout": "vistok.tokens",
    "LlamaGenClass": "vistok.models.generators.llamagen",
    "LlamaGenText": "vistok.models.generators.llamagen",
    "MAR": "vistok.models.generators.mar",
    "MaskGITBert": "vistok.models.generators.maskgit",
    "MaskGITUViT": "vistok.models.generators.maskgit",
    "MaskGITVQGAN": "vistok.models.tokenizers.maskgit_vqgan",
    "ModelMixin": "diffusers",  # diffusers looks it up here to learn how our pipelines' parts are loaded
    "NARClass": "vistok.models.generators.nar",
    "NARText": "vistok.models.generators.nar",
    "OneDPiece": "vistok.models.tokenizers.one_d_piece",
    "TextAR": "vistok.models.generators.text_ar",
    "TextToImagePipeline": "vistok.pipelines.text_to_image",
    "TiTok": "vistok.models.tokenizers.titok",
    "TiTokVAE": "vistok.models.tokenizers.titok",
    "Tokens": "vistok.tokens",
    "VQGAN": "vistok.models.tokenizers.vqgan",
    "XAR": "vistok.models.generators.xar",
    "load": "vistok.hub",
    "load_image": "vistok.data.images",
    "quantize_weights": "vistok.models.quantize",
}

__all__ = [*PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
