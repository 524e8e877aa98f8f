"""What was published with LANTERN (Jang et al. 2024) and LANTERN++ (Park et al. 2025): targets and their drafters.

The authors' instructions name the research licence of Chameleon; their repositories hold no licence file.
"""

from __future__ import annotations

from typing import Any

from vistok.models.generators.llamagen import PRESETS
from vistok.models.upstream.releases.llamagen import CODEBOOK_SIZE, sampling
from vistok.models.upstream.releases.release import Release

LICENCE = "Chameleon Research License (as the code says)"
XL = {
    "hidden_size": PRESETS["XL"]["dim"],
    "intermediate_size": PRESETS["XL"]["mlp_dim"],
    "num_attention_heads": PRESETS["XL"]["num_heads"],
    "vocab_size": CODEBOOK_SIZE,
}
ANOLE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 65536}


def _target(name: str, hub_id: str, image_size: int, input_type: str) -> Release:
    params = 777_678_080
    return Release(
        name,
        system="lantern",
        hub_id=hub_id,
        files=("model.safetensors", "config.json"),
        params=params,
        size_mb=round(params * 4e-6),
        config={
            **XL,
            "num_hidden_layers": PRESETS["XL"]["depth"],
            "rms_norm_eps": 1e-5,
            "block_size": (image_size // 16) ** 2,
            "input_type": input_type,
            "cls_token_num": 120,
            "caption_dim": 2048,
        },
        licence=LICENCE,
        sampling=sampling(7.5, top_k=1000),
        tokenizer=f"llamagen-vq-16-t2i-{image_size}",
    )


def _drafter(name: str, hub_id: str, params: int, config: dict[str, Any]) -> Release:
    return Release(
        name,
        system="lantern_drafter",
        hub_id=hub_id,
        files=("pytorch_model.bin", "config.json"),
        params=params,
        size_mb=round(params * 4e-6),
        config={**config, "num_hidden_layers": 1},
        licence=LICENCE,
    )


LANTERN = [
    _target("lantern-llamagen-t2i-256", "jadohu/LlamaGen-T2I", 256, "t2i"),
    _target("lantern-llamagen-t2i-512", "jadohu/LlamaGen-T2I-2", 512, "t2i2"),
]
LANTERN_DRAFTERS = [
    _drafter(
        "lantern-drafter-llamagen-256", "jadohu/llamagen_drafter", 44_567_040, XL | {"input_type": "t2i"}
    ),
    _drafter(
        "lantern-drafter-llamagen-512", "jadohu/llamagen2_drafter", 44_567_040, XL | {"input_type": "t2i2"}
    ),
    _drafter("lantern-drafter-anole", "jadohu/anole_drafter", 504_393_728, ANOLE | {"input_type": "anole"}),
]
