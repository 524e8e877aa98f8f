"""`vistok.load`: one call for shipped models, official releases, local folders and files, and hub repositories."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import vistok
from vistok.files import home_folder
from vistok.models import upstream
from vistok.models.quantize import check_quantization, quantize_weights
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.models.upstream.keys import mismatches
from vistok.models.upstream.releases import RELEASES, Release, matching_releases, possible_releases
from vistok.zoo import shipped

if TYPE_CHECKING:
    from vistok.decoding.speculative.drafter import Drafter
    from vistok.pipelines.base import ImagePipeline


class WeightsUnavailableError(FileNotFoundError):
    """Weights are neither on this machine nor reachable; the message says which files go where."""


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """A model or pipeline in evaluation mode.

    Args:
        name_or_path: a shipped name (`emoji-64`), a known release (`titok-l-32`), a local folder or file (saved by
            `save_pretrained`, or as officially released), or a hub id (`owner/name`). `vistok models` lists names.
        device, dtype: where and in which precision the weights end up.
        quantization: `"int8"` keeps the weights of the blocks of a generator or tokenizer, of a pipeline those of its
            generator, in 8 bits; see `quantize_weights`.
        revision, token, local_files_only: passed to the hub.

    Returns:
        A tokenizer or generator (diffusers `ModelMixin`) or a pipeline (`DiffusionPipeline`).

    Raises:
        ValueError: an unknown name (the nearest known ones are given) or quantization, or damaged or foreign weights.
        WeightsUnavailableError: the weights are not here and the hub cannot be reached.
        ModuleNotFoundError: a quantization without torchao.
    """
    if quantization is not None:
        check_quantization(quantization)
    name, path = str(name_or_path), Path(name_or_path)
    hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
    if name in (models := shipped()):
        model = _load_folder(models[name].folder)
    elif name in RELEASES:
        model = _load_release(RELEASES[name], hub)
    elif path.is_dir():
        model = _load_folder(path)
    elif path.is_file():
        model = _load_file(path)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix:
        model = _load_hub_id(name, hub)
    else:
        raise ValueError(_unknown(name))
    if dtype != torch.float32:
        model.to(dtype)
    if quantization is not None:
        quantize_weights(getattr(model, "transformer", model), quantization)
    return model.to(device)


def load_pipeline(name_or_path: str | Path, **options: Any) -> ImagePipeline:
    """A pipeline, by the arguments of `load`.

    Raises:
        ValueError, WeightsUnavailableError: as `load`, or the model is only a part of a pipeline.
    """
    from vistok.pipelines.base import ImagePipeline

    model = load(name_or_path, **options)
    if not isinstance(model, ImagePipeline):
        raise ValueError(
            f"{name_or_path} is a {type(model).__name__}, not a pipeline that draws images; see `vistok models`"
        )
    return model


def load_tokenizer(name_or_path: str | Path, **options: Any) -> ImageTokenizer:
    """A tokenizer, or the one of a pipeline, by the arguments of `load`; a `quantization` is the tokenizer's.

    Raises:
        ValueError, WeightsUnavailableError: as `load`, or the model is a generator.
    """
    quantization = options.pop("quantization", None)
    model = load(name_or_path, **options)
    tokenizer = getattr(model, "tokenizer", model)
    if quantization is not None:
        quantize_weights(tokenizer, quantization)
    if not isinstance(tokenizer, ImageTokenizer):
        raise ValueError(
            f"{name_or_path} is a {type(model).__name__}, not a tokenizer or a pipeline; see `vistok models`"
        )
    return tokenizer


def load_drafter(name_or_path: str | Path, target: Any) -> Drafter:
    """A drafter for speculative decoding.

    Args:
        name_or_path: `"jacobi"`, `"neighbours"` or `"recycling"`, which need no training; or what `load` takes: an EAGLE
            network, an early-exit adapter, or a small generator of the target's kind, also of a pipeline.
        target: the generator that it drafts for; a network is moved to its device.

    Raises:
        ValueError, WeightsUnavailableError: as `load`, or the model drafts nothing.
    """
    from vistok.decoding.speculative import drafters, eagle
    from vistok.models.drafters.eagle import EagleDrafter
    from vistok.models.drafters.early_exit import EarlyExitAdapter
    from vistok.models.generators.base import NextTokenGenerator

    if (name := str(name_or_path)) in drafters.TRAINING_FREE:
        return drafters.TRAINING_FREE[name]()
    loaded = load(name_or_path, device=target.device, dtype=target.dtype)
    model = getattr(loaded, "transformer", loaded)
    if isinstance(model, EagleDrafter):
        return eagle.EagleTreeDrafter(model)
    if isinstance(model, EarlyExitAdapter):
        return drafters.EarlyExitDrafter(model)
    if isinstance(model, NextTokenGenerator):
        return drafters.IndependentDrafter(model)
    raise ValueError(
        f"{name} is a {type(model).__name__}, which drafts nothing; name a trained drafter, a small "
        f"{type(target).__name__}, or one of {', '.join(drafters.TRAINING_FREE)}"
    )


def known_names() -> list[str]:
    """Every name that `load` resolves by itself."""
    return [*shipped(), *RELEASES]


def _unknown(name: str) -> str:
    close = get_close_matches(name.lower(), known_names(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown model {name!r}: no such name, folder or file{hint} (`vistok models` lists the names)"


def _load_folder(folder: Path) -> Any:
    if (folder / "model_index.json").is_file():
        return _load_pipeline(folder)
    config_file = next(
        (folder / name for name in ("config.json", "config.yaml") if (folder / name).is_file()),
        folder / "config.json",
    )
    weights_file = folder / "model.safetensors"
    if not config_file.is_file() and weights_file.is_file() and upstream.stored_config(weights_file):
        return _load_file(weights_file)
    if not config_file.is_file():
        raise ValueError(f"{folder} holds no model: expected config.json or model_index.json in it")
    config = upstream.load_config(config_file)
    system = upstream.system_of_config(config)
    if system is None and "_class_name" in config:
        return _load_ours(_public_class(config["_class_name"], config_file), folder)
    weights = upstream.read_checkpoint(_weights_file(folder))
    return upstream.load(system or _system(weights, folder), weights, config).eval()


def _load_pipeline(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    pipeline_class = _public_class(index.get("_class_name", ""), folder / "model_index.json")
    parts = {}
    for part, entry in index.items():
        # diffusers imports whatever library the file names, so only our own classes may be named.
        if isinstance(entry, list) and entry[0] is not None:
            if entry[0] != "vistok":
                raise ValueError(
                    f"{folder}: {part} is of the library {entry[0]!r}; only vistok's classes are loaded"
                )
            parts[part] = _load_ours(_public_class(entry[1], folder / "model_index.json"), folder / part)
    return pipeline_class.from_pretrained(folder, **parts, local_files_only=True)


def _load_ours(model_class: Any, folder: Path) -> Any:
    try:
        _check_weights(model_class, folder)
        model = model_class.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} does not hold a complete {model_class.__name__}: {error}") from None
    return model.eval()


def _check_weights(model_class: Any, folder: Path) -> None:
    """Raises ValueError unless the weights fit the configuration; diffusers would make up what is missing."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    with torch.device("meta"):
        model = model_class.from_config(model_class.load_config(folder, local_files_only=True))
    if weights and (problems := mismatches(model, weights)):
        raise ValueError("; ".join(problems))


def _public_class(name: str, source: Path) -> Any:
    if name not in vistok.PUBLIC or not name[0].isupper():
        raise ValueError(f"{source} names the class {name!r}, which vistok does not have")
    return getattr(vistok, name)


def _weights_file(folder: Path) -> Path:
    names = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has a config.json but no weights; expected {' or '.join(names)}")


def _load_file(path: Path) -> Any:
    weights = upstream.read_checkpoint(path)
    if (config := upstream.stored_config(path)) is not None:
        return upstream.load(upstream.system_of_config(config) or "", weights, config).eval()
    possible = possible_releases(weights, path.name)
    if not possible:
        raise ValueError(
            f"{path} is not one of the known releases; name its system and configuration: "
            "`vistok convert SYSTEM CHECKPOINT --config CONFIG -o DIR`"
        )
    if len(possible) > 1:
        names, one = " or ".join(release.name for release in possible), possible[0]
        raise ValueError(
            f"{path} can be {names}, whose weights have the same shapes: load the one you mean by name, with the file "
            f"in its folder, such as {releases_folder() / one.name / one.files[0]}"
        )
    return upstream.load(possible[0].system, weights, possible[0].complete_config()).eval()


def _system(weights: dict[str, torch.Tensor], folder: Path) -> str:
    fitting = matching_releases(weights)
    if not fitting:
        raise ValueError(
            f"{folder} has neither our layout nor that of a known release; see `vistok convert --help`"
        )
    return fitting[0].system


def _load_release(release: Release, hub: dict[str, Any]) -> Any:
    file = _release_file(release, hub)
    config = upstream.stored_config(file) or _release_config(release, hub)
    model: Any = upstream.load(release.system, upstream.read_checkpoint(file), config).eval()
    return model if release.tokenizer is None else _assemble(release, model, config, hub)


def _assemble(release: Release, model: Any, config: Mapping[str, Any], hub: dict[str, Any]) -> ImagePipeline:
    """The pipeline of a published generator, with its tokenizer and the published sampling settings as the preset.

    What the configuration itself says of the settings comes before what is known of the release.
    """
    from vistok.pipelines.class_to_image import ClassToImagePipeline
    from vistok.pipelines.text_to_image import TextToImagePipeline

    tokenizer = _load_release(_tokenizer_of(release, config), hub)
    published = {**(release.sampling or {}), **(config.get("generation") or {})}
    settings = upstream.sampling_settings(release.system, published)
    is_class = hasattr(model, "num_classes")
    pipeline_class = ClassToImagePipeline if is_class else TextToImagePipeline
    return pipeline_class(tokenizer, model, **settings)


def _tokenizer_of(release: Release, config: Mapping[str, Any]) -> Release:
    """The release that the configuration of a generator names, or else the one that it is known to go with."""
    if (named := upstream.tokenizer_hub_id(config)) is None:
        return RELEASES[str(release.tokenizer)]
    for one in RELEASES.values():
        if one.hub_id == named:
            return one
    raise ValueError(f"{release.name} makes tokens of {named}, which is no known release")


def _release_config(release: Release, hub: dict[str, Any]) -> Mapping[str, Any]:
    if release.config is None:
        return upstream.load_config(_release_file(release, hub, release.files[1]))
    return release.complete_config()


def _release_file(release: Release, hub: dict[str, Any], file: str | None = None) -> Path:
    """A file of a release, the weights by default."""
    from huggingface_hub import hf_hub_download

    weights = file or release.files[0]
    by_hand = releases_folder() / release.name
    if (by_hand / weights).is_file():
        return by_hand / weights
    try:
        return Path(hf_hub_download(release.hub_id, weights, **_local_if_offline(hub)))
    except (OSError, ValueError) as error:  # huggingface_hub's for no network, no repository, no file
        size = f" ({release.size_mb} MB)" if release.size_mb and file is None else ""
        raise WeightsUnavailableError(
            f"{release.name} needs {weights}{size} of the hub repository {release.hub_id}, which "
            f"could not be had ({_reason(error)}); download it elsewhere and put it at {by_hand / weights}"
        ) from None


def _local_if_offline(hub: dict[str, Any]) -> dict[str, Any]:
    """`hub` for its cache alone where it does not answer; a download would retry for half a minute before it fails."""
    from huggingface_hub import constants

    if hub["local_files_only"] or constants.HF_HUB_OFFLINE:
        return hub
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return hub  # it answers, whatever it says to this question
    except OSError:
        return hub | {"local_files_only": True}
    return hub


def releases_folder() -> Path:
    """Where releases that were downloaded by hand are looked for: `$VISTOK_HOME`, or `~/.cache/vistok`."""
    return home_folder()


def _load_hub_id(hub_id: str, hub: dict[str, Any]) -> Any:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "config.yaml", "*.safetensors", "pytorch_model.bin"]
    try:
        folder = snapshot_download(hub_id, allow_patterns=patterns, **_local_if_offline(hub))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(
            f"{_unknown(hub_id)}; as a hub repository it could not be had either ({_reason(error)}); download its "
            "config.json and weights elsewhere and pass their folder"
        ) from None
    return _load_folder(Path(folder))


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the hub does not answer, and its cache on this machine does not have it"
    return (str(error) or type(error).__name__).splitlines()[0]
