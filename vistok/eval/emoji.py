"""The report of a text -> emoji model: `python -m vistok.eval.emoji --data data/emoji --model emoji-64 --out DIR`.

It writes report.json and report.md (see `emoji_measures`), a grid of samples, held-out reconstructions, and what the
first tokens alone give as a strip and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.emoji import Emoji, read_index
from vistok.data.images import to_pil
from vistok.eval.emoji_lengths import length_strip, plot_lengths
from vistok.eval.emoji_measures import EmojiReport, Recognition, evaluate_emoji, generate, reconstruct
from vistok.eval.emoji_set import draw_names, first_by_name, read_images
from vistok.eval.features import load_extractor
from vistok.eval.pictures import grid, reconstruction_strip
from vistok.eval.rate_distortion_report import check_plotting
from vistok.eval.sources import to_float
from vistok.files import atomic_path
from vistok.models.tokenizers.base import ImageTokenizer

EXTRACTOR = "efficientnet-lite0"
STRIP_LENGTH = 12
WELL_KNOWN = """red apple, strawberry, banana, slice of pizza, hamburger, mushroom, cat face, panda face, penguin,
octopus, butterfly, tulip, rainbow, fire, rocket, automobile, bicycle, soccer ball, trophy, grinning face, lion face,
croissant, yellow heart, guitar"""  # the last four are held out


def sample_grid(
    pipeline: Any, emoji: Sequence[Emoji], sampling: dict[str, Any], seed: int = 0
) -> Image.Image:
    """A labelled grid of one sample for each of the WELL_KNOWN names; held-out names are marked."""
    heldout = {entry.name for entry in emoji if entry.split == "heldout"}
    names = [" ".join(name.split()) for name in WELL_KNOWN.split(",")]
    images = generate(pipeline, names, [seed] * len(names), sampling)
    labels = [f"{name}\n(held out)" if name in heldout else name for name in names]
    return grid(to_pil(to_float(images)), labels, columns=6)


def heldout_strip(
    tokenizer: ImageTokenizer, folder: Path, emoji: Sequence[Emoji], seed: int = 0
) -> Image.Image:
    """Reconstructions of held-out emoji drawn at random."""
    named = {name: emoji[index] for name, index in first_by_name(emoji).items()}
    heldout = [name for name, entry in named.items() if entry.split == "heldout"]
    names = draw_names(heldout, min(STRIP_LENGTH, len(heldout)), seed)
    originals = read_images(folder, [named[name] for name in names], tokenizer.image_size)
    reconstructions = reconstruct(tokenizer, originals)
    return reconstruction_strip(to_pil(to_float(originals)), to_pil(to_float(reconstructions)), names)


def markdown(report: EmojiReport) -> str:
    """The report as a table with its protocol and pictures."""
    rebuilt, fid = report.reconstruction, report.fid
    sampling = ", ".join(f"{name} {value}" for name, value in report.sampling.items())
    kid = "–" if fid.kid is None else f"{fid.kid:.5f}"
    rows = [
        ("Held-out reconstruction, PSNR", f"{rebuilt.psnr:.2f} dB"),
        ("Held-out reconstruction, SSIM", f"{rebuilt.ssim:.3f}"),
        ("Reconstruction of all images, PSNR", f"{report.reconstruction_all.psnr:.2f} dB"),
        *_codebook_rows(report),
        ("Recognised, all names", str(report.generated.every)),
        ("Recognised, training names", str(report.generated.train)),
        ("Recognised, held-out names", str(report.generated.heldout)),
        *_bound_rows(report.reconstructed),
        ("Chance", f"{100 * report.chance:.1f} %"),
        (f"Fréchet distance ({fid.extractor})", f"{fid.fid:.2f}"),
        (f"Kernel distance ({fid.extractor})", kid),
        ("Images per second", f"{report.images_per_second:.2f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# {report.model}

| Measure | Value |
|---|---|
{table}

- Reconstruction: {rebuilt.num_images} held-out images of {rebuilt.image_size} px, {rebuilt.tokens_per_image:.0f} tokens each; means over images after rounding to uint8 (data range 255).
- Recognised: the nearest of all {report.num_real} real images (cosine of {fid.extractor} features) has the subcategory, one of {report.num_subcategories}, of the emoji whose name was the prompt. {report.num_names} names drawn with seed {report.seed}, {report.seeds_per_name} images each. The upper bound replaces the generated image by the tokenizer's reconstruction of that emoji; chance is the same for a neighbour drawn at random.
- Fréchet distance: {fid.num_fake} generated against {fid.num_real} real images, one per name; {fid.preprocessing}; weights {fid.weights}. {fid.note}
- Sampling: {sampling}; batches of {report.batch_size}.
- Machine: {report.machine}.

![Samples](samples.png)

![Held-out emoji, originals and reconstructions](reconstructions.png)

## The first tokens alone

| Tokens | Held-out PSNR | Recognised, reconstructions |
|---:|---:|---:|
{_length_rows(report)}

![PSNR and recognition against the number of tokens](lengths.png)

![Held-out emoji from growing prefixes](prefixes.png)
"""


def _length_rows(report: EmojiReport) -> str:
    return "\n".join(f"| {p.num_tokens} | {p.psnr:.2f} dB | {p.recognised} |" for p in report.lengths)


def _codebook_rows(report: EmojiReport) -> list[tuple[str, str]]:
    result = report.reconstruction
    if result.codebook_usage is None:
        return []
    return [
        ("Held-out codebook usage", f"{100 * result.codebook_usage:.1f} % of {result.codebook_size}"),
        ("Held-out codebook entropy", f"{result.codebook_entropy:.2f} bits"),
        ("Codebook usage on all images", f"{100 * (report.reconstruction_all.codebook_usage or 0):.1f} %"),
    ]


def _bound_rows(bound: Recognition) -> list[tuple[str, str]]:
    return [
        ("Upper bound, all names", str(bound.every)),
        ("Upper bound, training names", str(bound.train)),
        ("Upper bound, held-out names", str(bound.heldout)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the report: writes report.json, report.md and its pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m vistok.eval.emoji", description="Measure an emoji model."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder built by vistok.data.emoji")
    parser.add_argument("--model", default="emoji-64", help="name or folder of the pipeline")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the report; replaced if it exists"
    )
    parser.add_argument("--num-names", type=int, default=200)
    parser.add_argument("--seeds-per-name", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    options = parser.parse_args(arguments)
    try:
        report = run(options)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{json.dumps(asdict(report))}\n")


def run(options: argparse.Namespace) -> EmojiReport:
    """Measure, draw, and write the folder `options.out`; see `main`."""
    import vistok

    check_plotting()
    emoji = read_index(options.data)
    given = {name: getattr(options, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    sampling = {name: value for name, value in given.items() if value is not None}
    extractor = load_extractor(EXTRACTOR, device=options.device)
    pipeline = vistok.load(options.model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    report = evaluate_emoji(
        pipeline,
        options.data,
        model=Path(options.model).name,
        extractor=extractor,
        num_names=options.num_names,
        seeds_per_name=options.seeds_per_name,
        seed=options.seed,
        sampling=sampling,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out) as folder:
        folder.mkdir()
        (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        sample_grid(pipeline, emoji, sampling).save(folder / "samples.png", optimize=True)
        strip = heldout_strip(pipeline.tokenizer, options.data, emoji)
        strip.save(folder / "reconstructions.png", optimize=True)
        prefixes = length_strip(pipeline.tokenizer, options.data, emoji)
        prefixes.save(folder / "prefixes.png", optimize=True)
        plot_lengths(report.lengths, folder / "lengths.png")
    return report


if __name__ == "__main__":
    main()
