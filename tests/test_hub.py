from __future__ import annotations

import json
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from tests.models.upstream.test_releases import read_manifest
from tests.tiny import save_tiny_pipeline
from vistok.hub import WeightsUnavailableError, known_names, load_pipeline, load_tokenizer
from vistok.models.upstream.releases import RELEASES

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("cat", output_type="pt").images


def test_folders_of_pipelines_and_their_parts(saved: Path) -> None:
    pipeline = vistok.load(saved)
    assert isinstance(pipeline, vistok.TextToImagePipeline)
    assert not pipeline.transformer.training and not pipeline.tokenizer.training
    tokenizer = vistok.load(str(saved / "tokenizer"))
    assert isinstance(tokenizer, vistok.ConvTiTok) and not tokenizer.training
    for name, tensor in pipeline.tokenizer.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name])


def test_shipped_names(saved: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(saved, tmp_path / "zoo" / "tiny-16")
    monkeypatch.setattr("vistok.zoo.ZOO", tmp_path / "zoo")
    assert {"tiny-16", "tiny-16/tokenizer", "tiny-16/transformer", "titok-l-32"} <= set(known_names())
    assert torch.equal(draw(vistok.load("tiny-16")), draw(vistok.load(saved)))
    assert isinstance(vistok.load("tiny-16/transformer"), vistok.TextAR)
    with pytest.raises(ValueError, match="unknown model 'tiny-61'.*did you mean 'tiny-16'"):
        vistok.load("tiny-61")


def test_dtype(saved: Path) -> None:
    assert vistok.load(saved, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert vistok.load(saved).transformer.dtype == torch.float32


def test_parts_by_kind(saved: Path) -> None:
    assert load_tokenizer(saved).identity() == load_tokenizer(saved / "tokenizer").identity()
    assert isinstance(load_pipeline(saved), vistok.TextToImagePipeline)
    with pytest.raises(ValueError, match="is a ConvTiTok, not a pipeline"):
        load_pipeline(saved / "tokenizer")
    with pytest.raises(ValueError, match="is a TextAR, not a tokenizer"):
        load_tokenizer(saved / "transformer")


@pytest.mark.parametrize("name", ["titok-l-23", "titok_l_32", "TiTok-L-32x"])
def test_unknown_names_suggest_near_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown model '{name}'.*did you mean .*'titok-l-32'.*vistok models"
    ):
        vistok.load(name)


def test_an_empty_folder_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: expected config\.json or model_index\.json"):
        vistok.load(tmp_path)


def drop(weights: Path) -> None:
    weights.unlink()


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def rename(weights: Path) -> None:
    weights.rename(weights.with_name("weights.safetensors"))


def fill_with_html(weights: Path) -> None:
    weights.write_text("<!DOCTYPE html><html></html>")


def rename_one_key(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["encoder.morn.weight"] = tensors.pop("encoder.norm.weight")
    save_file(tensors, weights)


@pytest.mark.parametrize("damage", [drop, cut, rename, fill_with_html, rename_one_key])
@pytest.mark.parametrize("part", ["", "tokenizer"])
def test_damaged_weights(copy: Path, damage, part: str) -> None:
    damage(copy / "tokenizer" / WEIGHTS)
    with pytest.raises(ValueError, match="does not hold a complete ConvTiTok: .{20}"):
        vistok.load(copy / part)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], "is of the library 'os'; only vistok's classes"),
        (["transformers", "AutoModel"], "of the library 'transformers'"),
        (["vistok", "load"], "names the class 'load'"),
        (["vistok", "Nothing"], "names the class 'Nothing', which vistok does not have"),
    ],
)
def test_a_pipeline_names_our_classes_only(copy: Path, entry: list, message: str) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"tokenizer": entry}))
    with pytest.raises(ValueError, match=message):
        vistok.load(copy)


def test_releases_without_network_say_what_goes_where(tmp_path: Path, monkeypatch, offline) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    release = RELEASES["titok-s-128"]
    with pytest.raises(WeightsUnavailableError) as raised:
        vistok.load("titok-s-128")
    message = str(raised.value)
    assert release.hub_id in message and str(release.size_mb) in message
    assert f"put it at {tmp_path / 'titok-s-128' / 'model.safetensors'}" in message


def test_a_release_put_there_by_hand_is_read(tmp_path: Path, monkeypatch, offline) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    (tmp_path / "titok-s-128").mkdir()
    (tmp_path / "titok-s-128" / "model.safetensors").write_text("<html>Sign in</html>")
    with pytest.raises(ValueError, match="is a web page, not a checkpoint"):
        vistok.load("titok-s-128")


def test_hub_ids_without_network(offline) -> None:
    with pytest.raises(
        WeightsUnavailableError,
        match="unknown model 'someone/model'.*the hub does not answer.*pass their folder",
    ):
        vistok.load("someone/model")


def test_without_network_the_cache_of_the_hub_is_still_used(offline, saved, monkeypatch) -> None:
    def from_cache(hub_id: str, *, local_files_only: bool, **options: object) -> str:
        assert hub_id == "someone/model" and local_files_only
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", from_cache)
    assert isinstance(vistok.load("someone/model"), vistok.TextToImagePipeline)


def test_a_lone_file_of_unknown_weights(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not one of the known releases.*vistok convert SYSTEM CHECKPOINT"):
        vistok.load(tmp_path / "a.safetensors")


@pytest.fixture
def files_of(tmp_path: Path, monkeypatch, offline):
    """`files_of(names)` puts files of releases by hand where they are looked for: their shapes, without numbers."""
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    monkeypatch.setattr(
        "vistok.models.upstream.read_checkpoint", lambda path: read_manifest(path.parent.name)
    )
    monkeypatch.setattr("vistok.models.upstream.stored_config", lambda path: None)

    def put(names: list[str]) -> list[Path]:
        paths = [tmp_path / name / RELEASES[name].files[0] for name in names]
        for path in paths:
            path.parent.mkdir()
            path.touch()
        return paths

    return put


def test_generators_of_one_d_piece_come_with_their_tokenizer(files_of) -> None:
    files_of(["maskgit-one-d-piece-b-256", "one-d-piece-b-256"])
    pipeline = vistok.load("maskgit-one-d-piece-b-256", device="meta")
    assert type(pipeline.tokenizer) is vistok.OneDPiece
    assert pipeline.tokenizer.num_tokens == pipeline.transformer.num_tokens == 256
    assert pipeline.sampling_settings()["guidance_scale"] == 8.5


@pytest.mark.parametrize(
    ("name", "kind", "tokenizer", "preset"),
    [
        ("llamagen-b-384", "LlamaGenClass", "llamagen-vq-16-384", {"guidance_scale": 2.0, "top_k": None}),
        (
            "llamagen-xl-t2i-512",
            "LlamaGenText",
            "llamagen-vq-16-t2i-512",
            {"guidance_scale": 7.5, "top_k": 1000},
        ),
        ("nar-m-256", "NARClass", "llamagen-vq-16", {"guidance_scale": 2.0, "top_k": None}),
        ("nar-xl-t2i-256", "NARText", "llamagen-vq-16-t2i-256", {"guidance_scale": 7.5, "top_k": None}),
    ],
)
def test_generators_over_a_grid_come_with_their_tokenizer(
    name: str, kind: str, tokenizer: str, preset: dict, files_of
) -> None:
    files_of([name, tokenizer])
    pipeline = load_pipeline(name, device="meta")
    is_text = kind.endswith("Text")
    assert type(pipeline) is (vistok.TextToImagePipeline if is_text else vistok.ClassToImagePipeline)
    assert type(pipeline.transformer) is getattr(vistok, kind) and type(pipeline.tokenizer) is vistok.VQGAN
    assert pipeline.tokenizer.image_size == RELEASES[tokenizer].config["image_size"]
    settings = pipeline.sampling_settings()
    assert settings.items() >= {**preset, "guidance_tokens": None, "temperature": 1.0, "top_p": 1.0}.items()


@pytest.mark.parametrize(
    ("name", "kind", "preset"),
    [
        (
            "mar-base",
            "MAR",
            {
                "num_steps": 256,
                "num_inference_steps": 100,
                "guidance_scale": 2.9,
                "guidance_schedule": "linear",
            },
        ),
        ("xar-base", "XAR", {"num_inference_steps": 40, "guidance_scale": 2.7, "guidance_schedule": "ramp"}),
    ],
)
def test_generators_of_latents_come_with_kl_16(name: str, kind: str, preset: dict, files_of) -> None:
    files_of([name, "kl-16"])
    pipeline = load_pipeline(name, device="meta")
    assert type(pipeline) is vistok.ClassToImagePipeline
    assert type(pipeline.transformer) is getattr(vistok, kind)
    assert type(pipeline.tokenizer) is vistok.KLTokenizer and pipeline.tokenizer.scaling_factor == 0.2325
    assert pipeline.sampling_settings().items() >= {**preset, "num_final_inference_steps": None}.items()


def test_a_generator_without_its_tokenizer_says_what_is_missing(files_of) -> None:
    files_of(["nar-b-256"])
    with pytest.raises(WeightsUnavailableError, match=r"llamagen-vq-16 needs vq_ds16_c2i\.pt \(288 MB\)"):
        vistok.load("nar-b-256")


def test_a_lone_file_is_told_by_its_name_where_shapes_do_not_tell(files_of, tmp_path: Path) -> None:
    file = files_of(["llamagen-b-384"])[0]
    assert vistok.load(file, device="meta").num_tokens == 24 * 24
    renamed = file.rename(file.with_name("mine.pt"))
    with pytest.raises(ValueError) as raised:
        vistok.load(renamed)
    message = str(raised.value)
    assert f"{renamed} can be llamagen-b-256 or llamagen-b-384" in message
    place = tmp_path / "llamagen-b-256" / "c2i_B_256.pt"
    assert f"load the one you mean by name, with the file in its folder, such as {place}" in message


FLEX_AR = RELEASES["flexar-113m-t2i"]


def test_a_release_that_needs_its_configuration_asks_for_it(tmp_path: Path, monkeypatch, offline) -> None:
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    (tmp_path / FLEX_AR.name).mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / FLEX_AR.name / "model.safetensors")
    with pytest.raises(
        WeightsUnavailableError, match="flexar-113m-t2i needs config.yaml of the hub repository"
    ):
        vistok.load(FLEX_AR.name)


@pytest.mark.parametrize("name", ["flexar-113m-t2i", "flexar-1b-c2i"])
def test_a_generator_of_flextok_brings_its_preset(name: str, tmp_path: Path, monkeypatch) -> None:
    from tests.models.upstream.test_flextok_ar import GOLDENS, class_tree, text_tree

    is_text = name.endswith("t2i")
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    folder = tmp_path / name
    folder.mkdir()
    golden = load_file(GOLDENS / f"ar_{name[-3:]}_tiny.safetensors")
    weights = {key[8:]: value for key, value in golden.items() if key.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    tree = text_tree() if is_text else class_tree()
    (folder / "config.yaml").write_text(json.dumps(tree | {"generation": {"temperature": 0.7, "top_p": 0.0}}))
    assert isinstance(vistok.load(folder), vistok.FlexARText if is_text else vistok.FlexARClass)

    tokenizer = vistok.ConvTiTok(
        image_size=16, num_tokens=12, levels=(25, 8), dim=16, num_heads=2, conv_dim=8, conv_depth=1
    )
    hub_ids = []
    load_release = vistok.hub._load_release

    def load_small(release, hub):
        if release.system != "flextok":
            return load_release(release, hub)
        hub_ids.append(release.hub_id)
        return tokenizer

    monkeypatch.setattr("vistok.hub._load_release", load_small)
    pipeline = load_release(RELEASES[name], {"local_files_only": True})
    assert hub_ids == [f"EPFL-VILAB/flextok_d18_d28_{'dfn' if is_text else 'in1k'}"]
    assert isinstance(pipeline, vistok.TextToImagePipeline if is_text else vistok.ClassToImagePipeline)
    scale = 3.0 if is_text else 1.5
    settings = {"guidance_scale": scale, "temperature": 0.7, "top_k": None, "top_p": 1.0}
    assert pipeline.sampling_settings() == settings | {"guidance_tokens": None, "typical_p": 1.0}
    assert pipeline.config["decode_options"]["num_inference_steps"] == 25
