from __future__ import annotations

import json

import pytest
import torch

import vistok
from tests.cifar10 import NUM_TOKENS, save_tiny_cifar10, save_tiny_kl_tokenizer
from vistok.eval import continuous_accelerations
from vistok.eval.continuous_accelerations import MAR_VARIANTS, XAR_VARIANTS, Sampler, Variant, main, measure
from vistok.eval.fid import extract_features

SIZES = {"latent_dim": 2, "latent_scale": 2.5, "num_tokens": NUM_TOKENS, "layout": "4x4", "num_classes": 10}
SIZES |= {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_dim": 16}
HEAD = {"num_buffer_tokens": 2, "denoiser_dim": 16, "denoiser_depth": 1}


@pytest.fixture
def models(tmp_path):
    """Folders of tiny models with random weights."""
    torch.manual_seed(0)
    vistok.XAR(**SIZES, order="cells-2").save_pretrained(tmp_path / "xar")
    for name in ("mar", "draft"):
        vistok.MAR(**SIZES, **HEAD).save_pretrained(tmp_path / name)
    save_tiny_kl_tokenizer(tmp_path / "tokenizer")
    save_tiny_cifar10(tmp_path / "cifar10")
    return tmp_path


def test_the_command_writes_a_row_for_every_variant(models, extractor, monkeypatch, capsys):
    few = {"num_steps": 4, "num_inference_steps": 3}
    speculation = next(variant.speculation for variant in MAR_VARIANTS if variant.speculation)
    monkeypatch.setattr(continuous_accelerations, "load_extractor", lambda name: extractor)
    monkeypatch.setattr(
        continuous_accelerations, "XAR_VARIANTS", (Variant("3 steps", {"num_inference_steps": 3}),)
    )
    monkeypatch.setattr(
        continuous_accelerations,
        "MAR_VARIANTS",
        (
            Variant("3 steps", few),
            Variant("reuse", {**few, "reuse_period": 2}),
            Variant("speculation", few, speculation),
        ),
    )
    folders = [f"--{name}={models / name}" for name in ("xar", "mar", "draft", "tokenizer", "cifar10")]
    sizes = ["--num-images=12", "--num-real=10", "--timed-batch=2", "--repeats=1"]
    main(["-o", str(models / "out"), *folders, *sizes])
    report = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["variant"]) for row in report["rows"]] == [
        ("xAR", "3 steps"),
        ("MAR", "3 steps"),
        ("MAR", "reuse"),
        ("MAR", "speculation"),
    ]
    assert all(row["seconds"] > 0 and row["from_real"] > 0 for row in report["rows"])
    assert report["rows"][0]["speed_up"] == report["rows"][1]["speed_up"] == 1.0
    page = (models / "out" / "report.md").read_text()
    assert "| MAR | speculation |" in page and str(models) not in page
    assert (models / "out" / "accelerations.png").stat().st_size > 1000


def test_the_distance_from_itself_is_that_of_other_seeds(models, extractor):
    """Twice the full steps: the same seeds, so both rows are equal, and other seeds than those of the reference."""
    sampler = Sampler("xAR", vistok.load(models / "xar"), vistok.load(models / "tokenizer"), None, 1.0)
    variant = Variant("3 steps", {"num_inference_steps": 3})
    real = extract_features([torch.zeros(4, 3, 32, 32, dtype=torch.uint8)], extractor, name="black")
    rows = measure(sampler, [variant, variant], real, extractor, num_images=10, timed_batch=1, repeats=1)
    assert rows[0].from_full == rows[1].from_full > 0


def test_the_published_variants_can_be_sampled():
    for model_class, variants in ((vistok.XAR, XAR_VARIANTS), (vistok.MAR, MAR_VARIANTS)):
        for variant in variants:
            continuous_accelerations.Sampling(variant.settings).check(model_class)
            assert variant.speculation is None or model_class is vistok.MAR
