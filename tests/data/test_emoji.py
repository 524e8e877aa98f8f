import io
import json
import tarfile

import pytest
from PIL import Image

from vistok.data.emoji import Emoji, build, is_held_out, read_index, readable

RECORDS = [
    {"name": "RED APPLE", "short_name": "apple", "short_names": ["apple"], "unified": "1F34E",
     "category": "Food & Drink", "subcategory": "food-fruit"},
    {"name": "OK HAND SIGN", "short_name": "ok_hand", "short_names": ["ok_hand"], "unified": "1F44C",
     "category": "People & Body", "subcategory": "hand-fingers-partial",
     "skin_variations": {"1F3FF": {"unified": "1F44C-1F3FF"}}},
    {"name": "NOT IN PICTURES", "short_name": "x", "short_names": ["x"], "unified": "1F999",
     "category": "Symbols", "subcategory": "other-symbol"},
]  # fmt: skip


def archive(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def picture(color) -> bytes:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste(color, (10, 10, 30, 30))
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True)
    return data.getvalue()


@pytest.fixture
def packages(tmp_path):
    images, names = tmp_path / "images.tgz", tmp_path / "names.tgz"
    archive(
        images,
        {
            "package/assets/1f34e.webp": picture((255, 0, 0, 255)),
            "package/assets/1f44c-fe0f.webp": picture((255, 200, 0, 255)),
            "package/assets/1f44c-1f3ff.webp": picture((90, 60, 30, 255)),
            "package/assets/1f000.webp": picture((0, 0, 0, 255)),  # has no name
            "package/README.md": b"text",
        },
    )
    archive(names, {"package/emoji.json": json.dumps(RECORDS).encode()})
    return images, names


def test_build_matches_code_points_and_composites_on_white(tmp_path, packages):
    images, names = packages
    found = build(tmp_path / "set", image_size=20, images_file=images, names_file=names)
    assert [(e.code, e.name, e.skin_tone) for e in found] == [
        ("1f34e", "red apple", ""),
        ("1f44c", "ok hand sign", ""),
        ("1f44c-1f3ff", "ok hand sign", "dark skin tone"),
    ]
    assert read_index(tmp_path / "set") == found
    apple = Image.open(tmp_path / "set" / found[0].file)
    assert apple.size == (20, 20)
    assert apple.getpixel((0, 0)) == (255, 255, 255) and apple.getpixel((10, 10)) == (255, 0, 0)


def test_a_failed_build_leaves_nothing(tmp_path, packages):
    images, _ = packages
    with pytest.raises(FileNotFoundError):
        build(tmp_path / "set", images_file=images, names_file=tmp_path / "missing.tgz")
    assert {path.name for path in tmp_path.iterdir()} == {"images.tgz", "names.tgz"}


def test_an_existing_folder_is_not_touched(tmp_path, packages):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="choose another"):
        build(tmp_path / "set", images_file=packages[0], names_file=packages[1])


def test_split_is_by_name_and_stable():
    assert not is_held_out("red apple") and not is_held_out("automobile")
    share = sum(is_held_out(f"name {i}") for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_missing_index_says_how_to_build_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m vistok.data.emoji"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("raw", "text"), [("OK HAND SIGN", "ok hand sign"), ("flag-fr", "flag fr"), ("red_car", "red car")]
)
def test_readable(raw, text):
    assert readable(raw) == text


def test_entries_are_hashable_values():
    entry = Emoji("train/a.png", "a", "n", ("x",), "", "c", "s", "train")
    assert entry == Emoji("train/a.png", "a", "n", ("x",), "", "c", "s", "train")
