"""What `vistok generate` says about speculative decoding: which drafter and rule, and whether it pays on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.files import atomic_path, home_folder

if TYPE_CHECKING:
    from vistok.decoding.speculative.generate import SpeculationStatistics
    from vistok.pipelines.base import ImagePipeline
    from vistok.pipelines.speculation import SpeculativeDecoding

DECODINGS = ("auto", "plain", "speculative")
TRIALS = 3
PROBED_IMAGES = (1, 8)
PROBE = {"TextToImagePipeline": "red apple", "ClassToImagePipeline": 0}  # what is drawn to measure

logger = logging.getLogger(__name__)


def choose_speculation(
    pipeline: ImagePipeline,
    decoding: str,
    drafter: str | None,
    accept: str,
    k: int | None,
    delta: float | None,
    *,
    needs_plain: bool,
) -> SpeculativeDecoding | None:
    """How to decode, by the options of `vistok generate`; `None` is plainly.

    Args:
        pipeline: the model.
        decoding: one of DECODINGS.
        drafter, accept, k, delta: see `make_speculation`.
        needs_plain: whether the call asks for something that "auto" must not speculate about.

    Raises:
        ValueError: an unknown decoding, or options of another one.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"unknown decoding {decoding!r}; choose one of {', '.join(DECODINGS)}")
    if decoding == "speculative":
        return make_speculation(pipeline, drafter, accept, k, delta)
    if drafter is not None or accept != "strict" or k is not None or delta is not None:
        raise ValueError("--drafter, --accept and --lantern-* need --decoding speculative")
    return None if decoding == "plain" or needs_plain else fastest(pipeline)


def make_speculation(
    pipeline: ImagePipeline, drafter: str | None, accept: str, k: int | None, delta: float | None
) -> SpeculativeDecoding:
    """What `--decoding speculative` and its options ask for; without a name, with the drafter of the pipeline's folder.

    Raises:
        ValueError: no drafter, or one that does not fit; an option of another rule.
    """
    from vistok.hub import load_drafter
    from vistok.pipelines.speculation import SpeculativeDecoding, check_speculation, make_rule

    check_speculation(pipeline.transformer)
    name = drafter or own_drafter(pipeline)
    if name is None:
        raise ValueError("this model comes without a drafter; name one with --drafter, for example jacobi")
    chosen = load_drafter(name, pipeline.transformer)
    return SpeculativeDecoding(chosen, make_rule(accept, pipeline.tokenizer, k=k, delta=delta))


def own_drafter(pipeline: ImagePipeline) -> Path | None:
    """The folder of the trained drafter that the pipeline came with, if there is one."""
    from vistok.pipelines.base import DRAFTER_FOLDER

    folder = Path(str(pipeline.config.get("_name_or_path") or "")) / DRAFTER_FOLDER
    return folder if (folder / "config.json").is_file() else None


def fastest(pipeline: Any) -> SpeculativeDecoding | None:
    """Lossless speculation with the pipeline's own drafter where that is faster than plain decoding, else `None`.

    It is measured once for each drafter, model, device, precision and number of threads, and remembered in a file. The
    answer is the same however many images are drawn, so that a seed gives the same image in every batch.
    """
    folder = own_drafter(pipeline)
    if folder is None:
        return None
    path, key = home_folder() / "speculation.json", _situation(pipeline, folder)
    known = _read(path)
    if known.get(key) is False:
        return None
    decoding = make_speculation(pipeline, None, "strict", None, None)
    if key not in known:
        known[key] = _pays(pipeline, decoding)
        _write(path, known)
    return decoding if known[key] else None


def _pays(pipeline: Any, decoding: SpeculativeDecoding) -> bool:
    """Whether `decoding` is faster for one image and for some; what does not pay for one is not tried with more."""
    logger.info("measuring once whether speculative decoding pays here")
    pipeline.set_progress_bar_config(disable=True)
    draws: list[Callable[..., Any]] = [
        partial(pipeline, [PROBE[type(pipeline).__name__]] * count, output_type="tokens")
        for count in PROBED_IMAGES
    ]
    pays = all(is_faster(partial(draw, speculation=decoding), draw) for draw in draws)
    pipeline.set_progress_bar_config()
    return pays


def _read(path: Path) -> dict[str, bool]:
    """What was remembered; nothing if the file is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path: Path, known: dict[str, bool]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            unfinished.write_text(json.dumps(known, indent=2) + "\n")
    except OSError as error:
        logger.warning("cannot remember which decoding is faster, it is measured again next time: %s", error)


def is_faster(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether the first call takes less time, by medians of a few in turns after one each that does not count."""
    from vistok.eval.timing import median_seconds

    for call in (one, other):
        call()
    first, second = median_seconds([one, other], TRIALS)
    return first < second


def _situation(pipeline: ImagePipeline, drafter: Path) -> str:
    """What the choice depends on, as text."""
    import torch

    import vistok
    from vistok.models.identity import model_identity

    digest = hashlib.sha256()
    for file in sorted(drafter.iterdir()):
        digest.update(file.read_bytes())
    device = pipeline.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    models = f"{model_identity(pipeline.transformer)}, drafter {digest.hexdigest()[:16]}"
    weights = "int8" if getattr(pipeline.transformer, "original_identity", None) else "plain"
    facts = f"{pipeline.transformer.dtype}, {weights} weights, {torch.get_num_threads()} threads"
    return f"{models}, vistok {vistok.__version__}, {where}, {facts}"


def describe(
    speculation: SpeculativeDecoding | None, statistics: SpeculationStatistics | None
) -> dict[str, Any] | None:
    """For the JSON line: drafter and rule, means over the images, and passes of the batch."""
    if speculation is None or statistics is None:
        return None
    return {
        "drafter": type(speculation.drafter).__name__,
        "rule": type(speculation.rule).__name__,
        "lossless": speculation.rule.is_lossless,
        "mean_accepted_length": round(float(statistics.mean_accepted_length.mean()), 3),
        "target_passes": statistics.target_passes,
        "draft_passes": statistics.draft_passes,
    }
