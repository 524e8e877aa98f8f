"""Join a trained tokenizer, generator and drafter into a shippable pipeline folder, in half precision.

`python -m vistok.training.assemble runs/tokenizer/model runs/generator/model -o vistok/zoo/emoji-64 --top-p 0.95`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vistok.files import atomic_path
from vistok.models.drafters.eagle import EagleDrafter
from vistok.models.generators.text_ar import TextAR
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.pipelines.base import DRAFTER_FOLDER
from vistok.pipelines.text_to_image import TextToImagePipeline


def assemble(
    tokenizer: Path, generator: Path, folder: Path, drafter: Path | None = None, **preset: Any
) -> None:
    """Write the pipeline of trained models with `preset` as its sampling settings; weights become float16.

    Args:
        tokenizer, generator: folders of the models.
        folder: where the pipeline goes.
        drafter: of an EAGLE network that was trained for the generator; it becomes the folder `drafter` beside them.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the two do not fit each other.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it first")
    parts: list[Any] = [ConvTiTok.from_pretrained(tokenizer), TextAR.from_pretrained(generator)]
    tokenizer_model, generator_model = (part.to(torch.float16) for part in parts)
    pipeline = TextToImagePipeline(tokenizer_model, generator_model, **preset)
    with atomic_path(folder) as partial:
        pipeline.save_pretrained(partial)
        if drafter is not None:
            EagleDrafter.from_pretrained(drafter).to(torch.float16).save_pretrained(partial / DRAFTER_FOLDER)
        _make_shippable(partial)


def _make_shippable(folder: Path) -> None:
    """Forget where the parts came from, and let everyone read the files."""
    for file in folder.rglob("*.*"):
        if file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if file.is_file():
            file.chmod(0o644)


def main() -> None:
    """Command line of `assemble`."""
    parser = argparse.ArgumentParser(description="Join trained models into a pipeline folder.")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("generator", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--drafter", type=Path, help="for speculative decoding")
    options = vars(parser.parse_args())
    assemble(options.pop("tokenizer"), options.pop("generator"), options.pop("output"), **options)


if __name__ == "__main__":
    main()
