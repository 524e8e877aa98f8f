from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.data.images import load_image, to_pil
from vistok.data.token_file import load_tokens

PART = {"dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with every kind of picture that is converted and not refused."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    base = Image.radial_gradient("L").resize((20, 24))
    rgb = Image.merge("RGB", (base, base.rotate(90), base))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.merge("RGBA", (*rgb.split(), base)).save(folder / "alpha.png")
    Image.fromarray(np.asarray(base).astype(np.uint16) * 256).save(folder / "sixteen.png")
    rgb.save(folder / "more" / "moving.gif", save_all=True, append_images=[rgb.rotate(180)])
    return folder


def test_every_kind_of_picture_becomes_the_tokens_the_library_makes(
    run, model: Path, pictures: Path, out: Path
) -> None:
    finished = run("tokenize", pictures, "-o", out / "t.safetensors", "--model", model, "--batch-size", 3)
    assert finished.code == 0, finished.stderr
    content = load_tokens(out / "t.safetensors")
    assert content.sources == ["alpha.png", "cmyk.jpg", "more/moving.gif", "sixteen.png"]
    tokenizer = vistok.load(model / "tokenizer")
    images = torch.stack([load_image(pictures / name, 16) for name in content.sources])
    assert torch.equal(content.tokens.data, tokenizer.encode(images).data)
    report = json.loads(finished.stdout)
    assert report["tokenizer"] == content.tokenizer == tokenizer.identity()
    assert report["num_tokens"] == 24 and report["tokens_per_second"] > 0


def test_detokenize_decodes_with_the_model_named_in_the_file(
    run, model: Path, pictures: Path, out: Path
) -> None:
    run("tokenize", pictures, "-o", out / "t.safetensors", "--model", model)
    finished = run("detokenize", out / "t.safetensors", "-o", f"{out}/back/")
    assert finished.code == 0, finished.stderr
    names = sorted(path.name for path in (out / "back").iterdir())
    assert names == ["000-alpha.png", "001-cmyk.png", "002-moving.png", "003-sixteen.png"]
    expected = to_pil(vistok.load(model / "tokenizer").decode(load_tokens(out / "t.safetensors").tokens))
    assert np.array_equal(np.asarray(Image.open(out / "back" / names[1])), np.asarray(expected[1]))
    assert json.loads(finished.stdout)["model"] == str(model)


def test_the_same_file_decodes_in_half_precision(run, model: Path, picture: Path, out: Path) -> None:
    run("tokenize", picture, "-o", out / "t.safetensors", "--model", model, "--dtype", "bfloat16")
    finished = run("detokenize", out / "t.safetensors", "-o", out / "a.png", "--dtype", "float16")
    assert finished.code == 0, finished.stderr
    assert Image.open(out / "a.png").size == (16, 16)


def test_reconstruct_shows_pairs_and_reports_their_psnr(run, model: Path, picture: Path, out: Path) -> None:
    finished = run(
        "reconstruct", picture, picture, "-o", out / "strip.png", "--model", model, "--num-tokens", 6
    )
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    tokenizer = vistok.load(model / "tokenizer")
    image = load_image(picture, 16)[None]
    back = to_pil(tokenizer.decode(tokenizer.encode(image)))[0]
    mse = np.square(np.asarray(back, float) - np.asarray(to_pil(image)[0], float)).mean()
    assert report["psnr"] == pytest.approx([10 * np.log10(255**2 / mse)] * 2, abs=2e-3)
    assert report["mean_psnr"] == report["psnr"][0]
    assert Image.open(out / "strip.png").width > 4 * 128


def test_each_picture_gets_its_own_number_of_tokens(run, model: Path, pictures: Path, out: Path) -> None:
    file = out / "t.safetensors"
    chosen = ("--model", model, "--batch-size", 3)
    finished = run("tokenize", pictures, "-o", file, *chosen, "--num-tokens", "1,6,2,3")
    assert finished.code == 0, finished.stderr
    tokens = load_tokens(file).tokens
    assert tokens.token_counts.tolist() == [1, 6, 2, 3]
    assert json.loads(finished.stdout)["num_tokens"] == 12
    whole = vistok.load(model / "tokenizer").encode(load_image(pictures / "cmyk.jpg", 16)[None])
    assert torch.equal(tokens.data[1:2], whole.data)
    assert run("detokenize", file, "-o", f"{out}/back/").code == 0
    for option, message in (
        ("1,2", "2 numbers of tokens for 4 pictures"),
        ("1,x", "a number, or one for each"),
    ):
        finished = run("tokenize", pictures, "-o", file, *chosen, "--num-tokens", option)
        assert finished.code == 2 and message in finished.stderr


def test_a_target_chooses_the_lengths(run, model: Path, pictures: Path, out: Path) -> None:
    def lengths(*options: object) -> list[int]:
        finished = run("reconstruct", pictures, "-o", out / "strip.png", "--model", model, *options)
        assert finished.code == 0, finished.stderr
        return json.loads(finished.stdout)["lengths"]

    assert lengths("--target-psnr", 0.01) == [1] * 4  # a random decoder reaches no more, and surely this
    assert lengths("--target-psnr", 99) == [6] * 4
    assert lengths("--target-psnr", 99, "--max-tokens", 4) == lengths("--num-tokens", 4) == [4] * 4
    finished = run(
        "reconstruct", pictures, "-o", out / "s.png", "--model", model, "--target-psnr", 9, "--num-tokens", 2
    )
    assert finished.code == 2 and "and not both" in finished.stderr


def test_a_tokenizer_of_fixed_length_refuses_a_prefix(run, picture: Path, tmp_path: Path, out: Path) -> None:
    sizes = {"image_size": 16, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_tokens": 6}
    parts = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in PART.items()}
    vistok.TiTok(**sizes, **parts, codebook_size=20).save_pretrained(tmp_path / "fixed")
    for option, message in (
        (("--num-tokens", 3), "always uses 6 tokens, not 3"),
        (("--target-psnr", 20), "no length to choose"),
    ):
        finished = run(
            "reconstruct", picture, "-o", out / "strip.png", "--model", tmp_path / "fixed", *option
        )
        assert finished.code == 2 and message in finished.stderr
    assert not list(out.iterdir())
