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
from vistok.models.upstream.releases import RELEASES, matching_releases

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
