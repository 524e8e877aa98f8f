"""The published NAR image generators (He et al. 2025, "Neighboring Autoregressive Modeling"), over LlamaGen's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.models.generators.nar import PRESETS
from vistok.models.upstream.releases.llamagen import class_config, quality, sampling, text_config
from vistok.models.upstream.releases.release import CODE_LICENCE, Release

# NAR-B is this one file; the others were saved by the same code.
FILES = ("last_version.pt",)


def _nar(name: str, hub_id: str, config: Mapping[str, Any], **entries: Any) -> Release:
    params = entries["params"]
    return Release(
        name,
        system="nar",
        hub_id=hub_id,
        files=FILES,
        size_mb=round(params * 4e-6),
        config={**config, "medusa_attention_num": 1},
        **entries,
    )


def _class_generator(
    size: str,
    owner: str,
    *,
    params: int,
    figures: tuple[float, float, float, float],
    licence: str = CODE_LICENCE,
) -> Release:
    return _nar(
        f"nar-{size.lower()}-256",
        f"{owner}/NAR-imagenet-256-{size}",
        class_config(PRESETS[size], grid=16),
        params=params,
        licence=licence,
        metrics=quality(2.0, figures),
        # of the published figures; the demo draws with a scale of 4.0 and top_k 2000
        sampling=sampling(2.0),
        tokenizer="llamagen-vq-16",
    )


def _text_generator(stage: int, image_size: int) -> Release:
    return _nar(
        f"nar-xl-t2i-{image_size}",
        f"yefly/NAR-XL-t2i-stage{stage}",
        text_config(PRESETS["XL"], grid=image_size // 16),
        params=818_969_600,
        licence=CODE_LICENCE,
        # of the demo's code; the script that calls it asks for a top_k of 1000
        sampling=sampling(7.5),
        tokenizer=f"llamagen-vq-16-t2i-{image_size}",
    )


NAR = [
    _class_generator(
        "B",
        "chenfeng1271",
        params=130_551_552,
        figures=(4.65, 212.3, 0.83, 0.47),
        licence="Apache-2.0",
    ),
    _class_generator("M", "yefly", params=295_453_696, figures=(3.27, 257.5, 0.82, 0.53)),
    _class_generator("L", "chenfeng1271", params=372_536_320, figures=(3.06, 263.9, 0.81, 0.53)),
    _class_generator("XL", "yefly", params=815_991_040, figures=(2.70, 277.5, 0.81, 0.58), licence="MIT"),
    _class_generator("XXL", "chenfeng1271", params=1_464_454_656, figures=(2.58, 293.5, 0.82, 0.57)),
    _text_generator(1, 256),
    _text_generator(2, 512),
]
