from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.pipelines.families import make_pipeline
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
    options = (
        "--guidance-scale",
        1,
        "--guidance-tokens",
        3,
        "--top-k",
        2,
        "--top-p",
        0.5,
        "--typical-p",
        0.9,
    )
    finished = run("generate", "cat", "-o", out / "a.png", "--model", model, *options)
    assert json.loads(finished.stdout)["sampling"] == {
        "guidance_scale": 1.0,
        "guidance_tokens": 3,
        "temperature": 1.0,
        "top_k": 2,
        "top_p": 0.5,
        "typical_p": 0.9,
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
    finished = run(*command, "--num-steps", 3, "--choice-temperature", 0)
    sampling = json.loads(finished.stdout)["sampling"]
    assert (sampling["num_inference_steps"], sampling["choice_temperature"]) == (3, 0.0)
    refused = run(*command, "--top-k", 3)
    assert refused.code == 2 and "--top-k is not a setting of a MaskGITBert" in refused.stderr
    refused = run(*command, "--preview", out)
    assert refused.code == 2 and "there are no previews" in refused.stderr


def test_a_continuous_generator_has_steps_within_steps(run, tmp_path: Path, out: Path) -> None:
    make_pipeline("mar").save_pretrained(tmp_path / "mar")
    command = ("generate", "1", "3", "-o", out / "a.png", "--model", tmp_path / "mar", "--seed", 2)
    steps = ("--num-steps", 3, "--num-inference-steps", 6, "--num-final-inference-steps", 2)
    finished = run(*command, *steps, "--temperature", 0.9)
    assert finished.code == 0, finished.stderr
    sampling = json.loads(finished.stdout)["sampling"]
    settings = {"num_steps": 3, "num_inference_steps": 6, "num_final_inference_steps": 2, "temperature": 0.9}
    assert sampling.items() >= settings.items()
    finished = run(*command, *steps, "--temperature", 0.9, "-o", out)
    pictures = vistok.load(tmp_path / "mar")(["1", "3"], seed=2, **settings).images
    assert np.array_equal(pixels(out / "001-3.png"), np.asarray(pictures[1]))
    refused = run(*command, "--top-k", 3)
    assert refused.code == 2 and "--top-k is not a setting of a MAR" in refused.stderr
    refused = run(*command, "--watermark", "secret")
    assert refused.code == 2 and "this model's tokens are continuous" in refused.stderr


def test_what_steps_are_called_depends_on_the_kind(run, class_model: Path, tmp_path: Path, out: Path) -> None:
    make_pipeline("xar-cells").save_pretrained(tmp_path / "xar")
    command = ("generate", "1", "-o", out / "a.png", "--model")
    refused = run(*command, tmp_path / "xar", "--num-steps", 3)
    assert refused.code == 2 and "--num-steps is not a setting of a XAR" in refused.stderr
    make_pipeline("maskgit-bert").save_pretrained(tmp_path / "maskgit")
    refused = run(*command, tmp_path / "maskgit", "--num-inference-steps", 3)
    assert refused.code == 2
    assert "--num-inference-steps is not a setting of a MaskGITBert" in refused.stderr


def test_a_text_model_has_no_steps(run, model: Path, out: Path) -> None:
    refused = run("generate", "cat", "-o", out / "a.png", "--model", model, "--num-steps", 3)
    assert refused.code == 2 and "--num-steps is not a setting of a TextAR" in refused.stderr


def test_a_negative_reaches_the_sampler(run, model: Path, class_model: Path, out: Path) -> None:
    options = ("--seed", 3, "--guidance-scale", 3)
    for folder, prompt, negative in ((model, "cat", "dog"), (class_model, "1", "2")):
        command = ("generate", prompt, "--model", folder, *options)
        finished = run(*command, "-o", out / "a.png", "--negative", negative)
        assert finished.code == 0, finished.stderr
        assert json.loads(finished.stdout)["negative"] == negative
        pipeline = vistok.load(folder)
        away = {pipeline.negative_argument: negative}
        expected = pipeline(prompt, seed=3, guidance_scale=3.0, **away).images[0]
        assert np.array_equal(pixels(out / "a.png"), np.asarray(expected))
        run(*command, "-o", out / "b.png")
        assert not np.array_equal(pixels(out / "a.png"), pixels(out / "b.png"))


@pytest.mark.parametrize(
    ("region", "kept"),
    [("top", range(8)), ("0.5,0.5,1,1", (10, 11, 14, 15)), (None, range(3))],
)
def test_a_part_of_a_picture_is_kept(run, class_model: Path, picture: Path, out: Path, region, kept) -> None:
    which = ("--keep-region", region) if region else ("--keep-tokens", 3)
    finished = run(
        "generate", "1", "-o", out / "a.png", "--model", class_model, "--keep-from", picture, *which
    )
    assert finished.code == 0, finished.stderr
    assert json.loads(finished.stdout)["kept"] == {"picture": str(picture), "tokens": len(kept)}
    pipeline = vistok.load(class_model)
    tokens = pipeline.tokenizer.encode(vistok.load_image(picture, 16)[None])
    keep = torch.zeros(16, dtype=torch.bool)
    keep[list(kept)] = True
    expected = pipeline("1", tokens=tokens, keep=keep).images[0]
    assert np.array_equal(pixels(out / "a.png"), np.asarray(expected))


def test_fewer_tokens_with_previews_on_the_way(run, model: Path, out: Path) -> None:
    command = ("generate", "cat", "dog", "--model", model, "--num-tokens", 4, "--seed", 2)
    finished = run(*command, "-o", out / "a.png", "--preview", out / "steps")
    assert finished.code == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert (report["num_tokens"], report["preview"]) == (4, str(out / "steps"))
    names = {path.name for path in (out / "steps").iterdir()}
    assert names == {"tokens-001.png", "tokens-002.png", "tokens-004.png"}
    assert np.array_equal(pixels(out / "steps" / "tokens-004.png"), pixels(out / "a.png"))
    assert not np.array_equal(pixels(out / "steps" / "tokens-001.png"), pixels(out / "a.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-tokens", 7), "num_tokens must be in 1..6, got 7"),
        (("--num-tokens", 0), "--num-tokens"),
        (("--preview", "/nowhere/at/all"), "/nowhere/at does not exist"),
    ],
)
def test_lengths_and_folders_that_cannot_be(run, model: Path, out: Path, options, message: str) -> None:
    refused = run("generate", "cat", "-o", out / "a.png", "--model", model, *options)
    assert refused.code == 2 and message in refused.stderr
    assert not list(out.iterdir())


def test_ctrl_c_ends_the_progress_bar(run, model: Path, out: Path, monkeypatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vistok.decoding.ordered.sample_tokens", interrupted)
    finished = run("generate", "cat", "-o", out / "a.png", "--model", model)
    assert finished.code == 130
    assert finished.stderr.rstrip().endswith(
        "vistok: error: interrupted; nothing half-written is left behind"
    )


def test_compiled_generation_draws_the_same_image(run, model: Path, out: Path) -> None:
    for name, options in (("plain", ["--decoding", "plain"]), ("compiled", ["--compile", "--batch-size", 1])):
        with torch.compiler.set_stance("force_eager"):
            finished = run("generate", "cat", "dog", "-o", out / f"{name}.png", "--model", model, *options)
        assert finished.code == 0, finished.stderr
        assert json.loads(finished.stdout)["compiled"] == (name == "compiled")
    assert np.array_equal(pixels(out / "plain.png"), pixels(out / "compiled.png"))


def test_compiling_and_speculation_exclude_each_other(run, model: Path, out: Path) -> None:
    finished = run(
        "generate", "cat", "-o", out / "cat.png", "--model", model, "--compile", "--decoding", "speculative"
    )
    assert finished.code == 2 and "--compile is for plain decoding" in finished.stderr
