"""What `vistok generate` says about speculative decoding: which drafter and rule, and whether it pays on this machine."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.decoding.speculative.generate import SpeculationStatistics
    from vistok.pipelines.base import ImagePipeline
    from vistok.pipelines.speculation import SpeculativeDecoding

DECODINGS = ("auto", "plain", "speculative")
TRIALS = 3
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
    num_images: int,
    needs_plain: bool,
) -> SpeculativeDecoding | None:
    """How to decode, by the options of `vistok generate`; `None` is plainly.

    Args:
        pipeline: the model.
        decoding: one of DECODINGS.
        drafter, accept, k, delta: see `make_speculation`.
        num_images: that are drawn at once; the more, the less a pass is bound by reading weights.
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
    return None if decoding == "plain" or needs_plain else fastest(pipeline, num_images)


def make_speculation(
    pipeline: ImagePipeline, drafter: str | None, accept: str, k: int | None, delta: float | None
) -> SpeculativeDecoding:
    """What `--decoding speculative` and its options ask for; without a name, with the drafter of the pipeline's folder.

    Raises:
        ValueError: no drafter, or one that does not fit; an option of another rule.
    """
    from vistok.hub import load_drafter
    from vistok.pipelines.speculation import SpeculativeDecoding, make_rule

    rule = make_rule(accept, pipeline.tokenizer, k=k, delta=delta)
    name = drafter or own_drafter(pipeline)
    if name is None:
        raise ValueError("this model comes without a drafter; name one with --drafter, for example jacobi")
    return SpeculativeDecoding(load_drafter(name, pipeline.transformer), rule)


def own_drafter(pipeline: ImagePipeline) -> Path | None:
    """The folder of the trained drafter that the pipeline came with, if there is one."""
    from vistok.pipelines.base import DRAFTER_FOLDER

    folder = Path(str(pipeline.config.get("_name_or_path") or "")) / DRAFTER_FOLDER
    return folder if (folder / "config.json").is_file() else None


def fastest(pipeline: Any, num_images: int) -> SpeculativeDecoding | None:
    """Lossless speculation with the pipeline's own drafter where that is faster than plain decoding, else `None`.

    It is measured once for each model, device, precision, number of threads and of images, and remembered in a file.
    What does not pay for one image, whose passes are bound most by reading weights, is not tried with more.
    """
    if own_drafter(pipeline) is None:
        return None
    decoding = make_speculation(pipeline, None, "strict", None, None)
    pays = all(_pays(pipeline, decoding, count) for count in sorted({1, num_images}))
    return decoding if pays else None


def _pays(pipeline: Any, decoding: SpeculativeDecoding, num_images: int) -> bool:
    """Whether `decoding` is faster for so many images, from the file or measured now."""
    from vistok.files import atomic_path, home_folder

    path, key = home_folder() / "speculation.json", _situation(pipeline, num_images)
    known: dict[str, bool] = json.loads(path.read_text()) if path.is_file() else {}
    if key not in known:
        logger.info("measuring once whether speculative decoding pays here for %d images", num_images)
        probe = [PROBE[type(pipeline).__name__]] * num_images
        draw: Callable[..., Any] = partial(pipeline, probe, output_type="tokens")
        pipeline.set_progress_bar_config(disable=True)
        known[key] = is_faster(partial(draw, speculation=decoding), draw)
        pipeline.set_progress_bar_config()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            unfinished.write_text(json.dumps(known, indent=2) + "\n")
    return known[key]


def is_faster(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether the first call takes less time, by medians of a few in turns after one each that does not count."""
    from vistok.eval.timing import median_seconds

    for call in (one, other):
        call()
    first, second = median_seconds([one, other], TRIALS)
    return first < second


def _situation(pipeline: ImagePipeline, num_images: int) -> str:
    """What the choice depends on, as text."""
    import torch

    import vistok
    from vistok.models.identity import model_identity

    device = pipeline.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    facts = f"{pipeline.transformer.dtype}, {torch.get_num_threads()} threads, {num_images} images"
    return f"{model_identity(pipeline.transformer)}, vistok {vistok.__version__}, {where}, {facts}"


def statistics_of(statistics: SpeculationStatistics | None) -> dict[str, Any] | None:
    """For the JSON line: means over the images, and passes of the batch."""
    if statistics is None:
        return None
    return {
        "mean_accepted_length": round(float(statistics.mean_accepted_length.mean()), 3),
        "target_passes": statistics.target_passes,
        "draft_passes": statistics.draft_passes,
    }
