"""Every published state dict converts: keys and shapes of the manifests against models on the meta device."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vistok.models import upstream
from vistok.models.tokenizers import one_d_piece, titok
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.releases import RELEASES, Release, matching_releases, possible_releases
from vistok.pipelines.fit import objections
from vistok.pipelines.settings import OrderedSettings, settings_for

GOLDENS = Path(__file__).parents[2] / "goldens"
MANIFESTS = {
    "titok-l-32": "titok/manifest-titok_l32",
    "titok-b-64": "titok/manifest-titok_b64",
    "titok-s-128": "titok/manifest-titok_s128",
    "titok-bl-64-vq8k": "titok/manifest-titok_bl64_vq8k",
    "titok-bl-128-vq8k": "titok/manifest-titok_bl128_vq8k",
    "titok-sl-256-vq8k": "titok/manifest-titok_sl256_vq8k",
    "titok-ll-32-vae-c16": "titok/manifest-titok_ll32_vae_c16",
    "titok-bl-64-vae-c16": "titok/manifest-titok_bl64_vae_c16",
    "titok-bl-128-vae-c16": "titok/manifest-titok_bl128_vae_c16",
    "maskgit-vqgan-imagenet-f16-256": "titok/manifest-maskgit_vqgan_imagenet_f16_256",
    "one-d-piece-s-256": "one_d_piece/manifest-one_d_piece_s256",
    "one-d-piece-b-256": "one_d_piece/manifest-one_d_piece_b256",
    "one-d-piece-l-256": "one_d_piece/manifest-one_d_piece_l256",
    "maskgit-titok-l-32": "maskgit/manifest-generator_titok_l32",
    "maskgit-titok-b-64": "maskgit/manifest-generator_titok_b64",
    "maskgit-titok-s-128": "maskgit/manifest-generator_titok_s128",
    "maskgit-one-d-piece-s-256": "maskgit/manifest-maskgit_one_d_piece_s256",
    "maskgit-one-d-piece-b-256": "maskgit/manifest-maskgit_one_d_piece_b256",
    "maskgit-one-d-piece-l-256": "maskgit/manifest-maskgit_one_d_piece_l256",
    "flextok-d12-d12-in1k": "flextok/manifest-flextok_d12_d12_in1k",
    "flextok-d18-d18-in1k": "flextok/manifest-flextok_d18_d18_in1k",
    "flextok-d18-d28-in1k": "flextok/manifest-flextok_d18_d28_in1k",
    "flextok-d18-d28-dfn": "flextok/manifest-flextok_d18_d28_dfn",
    "flextok-vae-c4": "flextok/manifest-flextok_vae_c4",
    "flextok-vae-c8": "flextok/manifest-flextok_vae_c8",
    "flextok-vae-c16": "flextok/manifest-flextok_vae_c16",
    "llamagen-vq-16": "llamagen/manifest-vq-ds16",
    "llamagen-vq-16-384": "llamagen/manifest-vq-ds16",
    "llamagen-vq-8": "llamagen/manifest-vq-ds8",
    "llamagen-vq-16-t2i-256": "llamagen/manifest-vq-ds16",
    "llamagen-vq-16-t2i-512": "llamagen/manifest-vq-ds16",
    "llamagen-b-256": "llamagen/manifest-c2i-B",
    "llamagen-b-384": "llamagen/manifest-c2i-B",
    "llamagen-l-256": "llamagen/manifest-c2i-L",
    "llamagen-l-384": "llamagen/manifest-c2i-L",
    "llamagen-xl-384": "llamagen/manifest-c2i-XL",
    "llamagen-xxl-384": "llamagen/manifest-c2i-XXL",
    "llamagen-3b-384": "llamagen/manifest-c2i-3B",
    "llamagen-xl-t2i-256": "llamagen/manifest-t2i-XL",
    "llamagen-xl-t2i-512": "llamagen/manifest-t2i-XL",
    "lantern-llamagen-t2i-256": "lantern/manifest-llamagen_t2i",
    "lantern-llamagen-t2i-512": "lantern/manifest-llamagen_t2i_2",
    "lantern-drafter-llamagen-256": "lantern/manifest-llamagen_drafter",
    "lantern-drafter-llamagen-512": "lantern/manifest-llamagen2_drafter",
    "lantern-drafter-anole": "lantern/manifest-anole_drafter",
    "nar-b-256": "nar/manifest-c2i-B",
    "nar-m-256": "nar/manifest-c2i-M",
    "nar-l-256": "nar/manifest-c2i-L",
    "nar-xl-256": "nar/manifest-c2i-XL",
    "nar-xxl-256": "nar/manifest-c2i-XXL",
    "nar-xl-t2i-256": "nar/manifest-t2i-XL",
    "nar-xl-t2i-512": "nar/manifest-t2i-XL",
    "kl-16": "kl_vae/manifest-kl16",
    "mar-base": "mar/manifest-mar_base",
    "mar-large": "mar/manifest-mar_large",
    "mar-huge": "mar/manifest-mar_huge",
    "xar-base": "xar/manifest-xar_base",
    "xar-large": "xar/manifest-xar_large",
    "xar-huge": "xar/manifest-xar_huge",
}


def read_manifest(name: str) -> dict[str, Tensor]:
    manifest = json.loads(gzip.decompress((GOLDENS / f"{MANIFESTS[name]}.json.gz").read_bytes()))
    return {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}


def test_every_release_has_a_manifest() -> None:
    assert set(MANIFESTS) == {name for name, release in RELEASES.items() if release.config is not None}


@pytest.mark.parametrize("name", MANIFESTS)
def test_release_converts_strictly(name: str) -> None:
    release, weights = RELEASES[name], read_manifest(name)
    model = upstream.load(release.system, weights, release.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == release.params
    assert release.size_mb == round(release.params * 4e-6)


def arguments_of(model: ModelMixin) -> dict[str, object]:
    """Constructor arguments; entries with an underscore say who saved the configuration, and how."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", [*titok.PRESETS, *one_d_piece.PRESETS])
def test_presets_are_the_releases(name: str) -> None:
    model_class, arguments = {**titok.PRESETS, **one_d_piece.PRESETS}[name]
    with torch.device("meta"):
        preset = model_class(**arguments)
    with torch.device("meta"):
        released = upstream.build_model(RELEASES[name].system, RELEASES[name].config)
    assert type(released) is model_class
    assert arguments_of(released) == arguments_of(preset)


def test_generators_name_their_tokenizer_and_settings() -> None:
    generators = [release for release in RELEASES.values() if release.system == "maskgit"]
    assert {release.tokenizer for release in generators if "titok" in release.name} == {
        "titok-l-32",
        "titok-b-64",
        "titok-s-128",
    }
    for release in generators:
        assert release.sampling is not None and release.sampling["guidance_scale"] > 1
        vq_model = RELEASES[release.tokenizer].config["model"]["vq_model"]
        assert release.config["image_seq_len"] == vq_model["num_latent_tokens"]
        assert release.config["codebook_size"] == vq_model["codebook_size"]


def build(release: Release) -> ModelMixin:
    with torch.device("meta"):
        return upstream.build_model(release.system, release.config)


PAIRS = [r.name for r in RELEASES.values() if r.tokenizer is not None and r.config is not None]


@pytest.mark.parametrize("name", PAIRS)
def test_generators_fit_the_tokenizer_that_they_name(name: str) -> None:
    release = RELEASES[name]
    generator, tokenizer = build(release), build(RELEASES[release.tokenizer])
    assert objections(tokenizer, generator) == []
    assert hasattr(generator, "num_classes") != ("t2i" in name)
    if image_size := [part for part in name.split("-") if part in ("256", "384", "512")]:
        assert tokenizer.image_size == int(image_size[-1])


def test_the_published_settings_of_llamagen_and_nar() -> None:
    scales = {
        "llamagen-b-256": 2.0,
        "llamagen-b-384": 2.0,
        "llamagen-l-256": 1.75,
        "llamagen-l-384": 2.0,
        "llamagen-xl-384": 1.75,
        "llamagen-xxl-384": 1.75,
        "llamagen-3b-384": 1.65,
        "nar-b-256": 2.0,
        "nar-xxl-256": 2.0,
        "llamagen-xl-t2i-512": 7.5,
        "nar-xl-t2i-256": 7.5,
    }
    for name, scale in scales.items():
        settings = upstream.sampling_settings(RELEASES[name].system, RELEASES[name].sampling)
        top_k = 1000 if "llamagen" in name and "t2i" in name else None
        assert settings == {
            "guidance_scale": scale,
            "guidance_tokens": None,
            "temperature": 1.0,
            "top_k": top_k,
            "top_p": 1.0,
        }


def test_the_published_settings_of_mar_and_xar() -> None:
    scales = {"mar-base": 2.9, "mar-large": 3.0, "mar-huge": 3.2}
    for name, scale in scales.items():
        assert upstream.sampling_settings("mar", RELEASES[name].sampling) == {
            "num_steps": 256,
            "num_inference_steps": 100,
            "guidance_scale": scale,
            "guidance_schedule": "linear",
            "temperature": 1.0,
        }
    for name, steps, scale in (("xar-base", 40, 2.7), ("xar-large", 50, 2.3), ("xar-huge", 50, 2.2)):
        assert upstream.sampling_settings("xar", RELEASES[name].sampling) == {
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "guidance_schedule": "ramp",
        }


def test_licences_and_figures_of_mar_and_xar() -> None:
    of_mar, of_xar = RELEASES["mar-large"], RELEASES["xar-huge"]
    assert (of_mar.licence, of_xar.licence, RELEASES["kl-16"].licence) == ("MIT", "none given", "MIT")
    figure = "gFID (ImageNet-1k, 256 px, 50,000 samples, cfg {}, published)"
    assert of_mar.metrics == {figure.format(3.0): 1.78, "IS": 296.0}
    assert of_xar.metrics == {figure.format(2.2): 1.24}
    assert RELEASES["xar-large"].metrics == RELEASES["kl-16"].metrics == {}


def test_shapes_tell_every_generator_of_latents() -> None:
    for name in ("kl-16", "mar-base", "xar-large"):
        assert names(matching_releases(read_manifest(name))) == [name]


@pytest.mark.parametrize("name", [r.name for r in RELEASES.values() if r.tokenizer is not None])
def test_published_settings_are_those_of_a_pipeline(name: str) -> None:
    """None is misspelt or out of range: the settings of its kind of generator take them all."""
    release = RELEASES[name]
    settings = upstream.sampling_settings(release.system, release.sampling)
    settings.pop("decode_options", None)
    is_flex_ar = release.config is None  # its sizes are known from its file only
    chosen = OrderedSettings(**settings) if is_flex_ar else settings_for(build(release), settings)
    assert chosen.guidance_scale > 1


def test_the_name_of_a_file_tells_what_shapes_do_not() -> None:
    weights = read_manifest("llamagen-b-384")
    assert names(matching_releases(weights)) == ["llamagen-b-256", "llamagen-b-384"]
    assert names(possible_releases(weights, "c2i_B_384.pt")) == ["llamagen-b-384"]
    assert names(possible_releases(weights, "mine.pt")) == ["llamagen-b-256", "llamagen-b-384"]
    # the file of the tokenizer is the same for both sizes
    tokenizer = possible_releases(read_manifest("llamagen-vq-16"), "vq_ds16_c2i.pt")
    assert names(tokenizer) == ["llamagen-vq-16", "llamagen-vq-16-384"]
    # and these differ by nothing that loading them needs
    masked = read_manifest("maskgit-one-d-piece-b-256")
    assert len(possible_releases(masked, "pytorch_model.bin")) == 1
    assert possible_releases({"something.else": torch.empty(1)}, "c2i_B_384.pt") == []


def test_a_buffer_beside_the_parameters_does_not_hide_a_release() -> None:
    text = names(matching_releases(read_manifest("nar-xl-t2i-256")))
    assert text == ["nar-xl-t2i-256", "nar-xl-t2i-512"]


def names(releases: list[Release]) -> list[str]:
    return [release.name for release in releases]


def test_weights_alone_tell_the_release() -> None:
    assert [release.name for release in matching_releases(read_manifest("titok-b-64"))] == ["titok-b-64"]
    assert [release.name for release in matching_releases(read_manifest("one-d-piece-b-256"))] == [
        "one-d-piece-b-256"
    ]
    generators = matching_releases(read_manifest("maskgit-one-d-piece-b-256"))
    assert [release.name[-5:] for release in generators] == ["s-256", "b-256", "l-256"]
    assert matching_releases({"something.else": torch.empty(1)}) == []


def test_weights_of_another_release_are_listed() -> None:
    with pytest.raises(
        ValueError, match=r"do not fit TiTok: .*of another shape \(.*latent_tokens \[64, 768\]"
    ):
        upstream.load("titok", read_manifest("titok-b-64"), RELEASES["titok-l-32"].config)


def test_the_ignored_buffer_is_the_only_extra_key_allowed() -> None:
    release, weights = RELEASES["titok-bl-64-vq8k"], read_manifest("titok-bl-64-vq8k")
    weights["quantize.embed_prob"] = torch.empty(8192, device="meta")
    with torch.device("meta"):
        model = upstream.build_model("titok", release.config)
    assert mismatches(model, upstream.translate_weights("titok", weights)) == []
    weights["quantize.other"] = torch.empty(8192, device="meta")
    assert mismatches(model, upstream.translate_weights("titok", weights)) == [
        "1 unexpected (quantize.other)"
    ]
