from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vistok
from tests.tiny import TOKENIZER

MASKGIT = {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_image_is_saved_plainly_and_is_what_the_library_draws(run, model: Path, out: Path) -> None:
    finished = run(
        "generate", "cat", "-o", out / "cat.png", "--model", model, "--seed", 5, "--temperature", 0.7
    )
    assert finished.code == 0, finished.stderr
    pipeline = vistok.load(model)
    expected = pipeline("cat", seed=5, temperature=0.7).images[0]
    assert np.array_equal(pixels(out / "cat.png"), np.asarray(expected))
    assert json.loads(finished.stdout)["sampling"]["temperature"] == 0.7


def test_several_images_make_one_labelled_grid(run, model: Path, out: Path) -> None:
    finished = run("generate", "cat", "dog", "-o", out / "grid.png", "--model", model, "--num-images", 4)
    assert finished.code == 0, finished.stderr
    assert json.loads(finished.stdout)["num_images"] == 8
    width, height = Image.open(out / "grid.png").size
    assert 4 * 128 < width < 5 * 128 and 2 * 128 < height < 3 * 128  # a row for each prompt


def test_a_folder_gets_one_png_each(run, model: Path, out: Path) -> None:
    for target in (out, f"{out}/new/"):
        finished = run("generate", "red cat", "../a/b", "-o", target, "--model", model)
        assert finished.code == 0, finished.stderr
        assert {path.name for path in Path(target).glob("*.png")} == {"000-red-cat.png", "001-a-b.png"}
    assert pixels(out / "000-red-cat.png").shape == (16, 16, 3)
    assert {path.name for path in out.iterdir()} == {"000-red-cat.png", "001-a-b.png", "new"}


def test_options_reach_the_sampler(run, model: Path, out: Path) -> None:
    options = ("--guidance-scale", 1, "--top-k", 2, "--top-p", 0.5)
    finished = run("generate", "cat", "-o", out / "a.png", "--model", model, *options)
    assert json.loads(finished.stdout)["sampling"] == {
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 2,
        "top_p": 0.5,
    }


def test_classes_are_drawn_by_index(run, tmp_path: Path, out: Path) -> None:
    torch.manual_seed(0)
    generator = vistok.MaskGITBert(codebook_size=20, num_tokens=6, num_classes=4, **MASKGIT)
    pipeline = vistok.ClassToImagePipeline(vistok.ConvTiTok(**TOKENIZER), generator, num_inference_steps=2)
    pipeline.save_pretrained(tmp_path / "classes")
    command = ("generate", "1", "3", "-o", out / "a.png", "--model", tmp_path / "classes")
    finished = run(*command)
    assert finished.code == 0, finished.stderr
    assert json.loads(finished.stdout)["sampling"]["num_inference_steps"] == 2
    refused = run(*command, "--top-k", 3)
    assert refused.code == 2 and "--top-k is not a setting of a ClassToImagePipeline" in refused.stderr
