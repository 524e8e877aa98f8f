"""What a drafter learns from: images that its target makes, with what the target read and what it drew from.

Kept in shards, because for a drafter, a fraction of its target, running the target once more at every step would cost more
than the step itself. The features are float16. The law of every token, guided and filtered, is kept as its most probable
tokens: after top-p that is all of it, and neither the head of the target nor a sort of the vocabulary is needed again.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vistok.data.captions import COLORS, can_turn_hue, captions
from vistok.data.emoji import Emoji, read_index
from vistok.decoding.guidance import apply_guidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import token_probabilities
from vistok.decoding.streams import ImageStreams
from vistok.files import atomic_path
from vistok.kernels.attention import TreeMask
from vistok.models.generators.base import Condition, NextTokenGenerator, Reading, join_conditions
from vistok.models.identity import model_identity
from vistok.pipelines.settings import OrderedSettings

BATCH_SIZE = 64  # images made at once
COLORED = 0.3  # share of the emoji prompts that name a colour, where it can be another one


@dataclass(frozen=True)
class TargetImages:
    """Some images.

    Args:
        indices: `[b n]` int64, the tokens.
        features: `[b branches l d]`, of the last `l - n + 1` condition positions and of all tokens but the last; with
            guidance the conditional branch first, then the unconditional one.
        law_tokens: `[b n k]` int64, the most probable tokens at every position.
        law_probs: `[b n k]`, what they were drawn with.
    """

    indices: Tensor
    features: Tensor
    law_tokens: Tensor
    law_probs: Tensor

    def rows(self, chosen: Tensor | slice) -> TargetImages:
        """Some of them."""
        parts = (self.indices, self.features, self.law_tokens, self.law_probs)
        return TargetImages(*(part[chosen] for part in parts))

    def to(self, device: torch.device) -> TargetImages:
        """On a device, in the types that are computed with."""
        return TargetImages(
            self.indices.to(device).long(),
            self.features.to(device).float(),
            self.law_tokens.to(device).long(),
            self.law_probs.to(device).float(),
        )


@dataclass(frozen=True)
class Making:
    """How images are made and what is kept of them.

    Args:
        target: makes them.
        settings: how it is sampled.
        prefix_length: condition positions kept in front of the last.
        law_size: most tokens kept of every law; what is beyond is dropped and the rest normalised.

    Raises:
        ValueError: a generator that does not predict token after token.
    """

    target: NextTokenGenerator
    settings: OrderedSettings
    prefix_length: int
    law_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.target, NextTokenGenerator):
            raise ValueError(
                f"{type(self.target).__name__} does not predict token after token, so nothing can draft for it"
            )

    def images(self, condition: Condition, seeds: list[int]) -> TargetImages:
        """One image for each row of `condition`, as its seed alone decides."""
        target = self.target
        guidance = self.settings.guidance(target.order)
        rows = condition
        if guidance.scale != 1.0:
            rows = join_conditions(condition, target.null_condition_for(condition))
        drawn = generate_ordered(
            target,
            condition,
            streams=ImageStreams.from_seeds(seeds),
            sampling=self.settings.sampling,
            guidance=guidance,
        )
        prefix, nodes = read_image(target, rows, drawn.data)
        if prefix.features.shape[1] <= self.prefix_length:
            raise ValueError(
                f"the drafter reads {self.prefix_length} condition positions in front of the last, "
                f"{type(target).__name__} has {prefix.features.shape[1] - 1}"
            )
        features = torch.cat([prefix.features[:, -self.prefix_length - 1 :], nodes.features], dim=1)
        law = self._law(torch.cat([prefix.logits, nodes.logits], dim=1))
        return TargetImages(drawn.data, features.unflatten(0, (-1, len(seeds))).transpose(0, 1), *law)

    def _law(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens are drawn from, `[r n v]` -> the most probable tokens and their probabilities, `[b n k]`."""
        guidance, order = self.settings.guidance(self.target.order), self.target.order
        logits = logits.float()
        if guidance.scale != 1.0:
            cond, uncond = logits.chunk(2)
            guided = [
                apply_guidance(cond[:, i], uncond[:, i], guidance.at(i, order.num_steps))
                for i in range(cond.shape[1])
            ]
            logits = torch.stack(guided, dim=1)
        probs = token_probabilities(logits, self.settings.sampling)
        best = probs.topk(min(self.law_size, probs.shape[-1]), dim=-1)
        return best.indices, best.values / best.values.sum(dim=-1, keepdim=True)


def read_image(target: NextTokenGenerator, condition: Condition, indices: Tensor) -> tuple[Reading, Reading]:
    """What a generator makes of a condition of r rows, and of all tokens but the last of `[b n]`, r a multiple of b."""
    cache = target.new_cache(len(condition))
    prefix = target.read_prefix(condition.to(target.device), cache)
    cache.split_rows()
    seen = indices[:, :-1].repeat(len(condition) // len(indices), 1)  # [r n-1]
    depths = torch.arange(seen.shape[1], device=seen.device)
    earlier = (depths <= depths[:, None]).expand(len(seen), -1, -1)
    mask = TreeMask(cache.lengths, earlier)
    return prefix, target.read_nodes(seen, depths.expand(len(seen), -1), mask, cache)


class TargetShards:
    """The images of a folder; files are mapped into memory, and read as they are needed."""

    def __init__(self, files: list[Path]) -> None:
        loaded = [load_file(file) for file in files]
        names = ("indices", "features", "law_tokens", "law_probs")
        self.shards = [TargetImages(*(tensors[name] for name in names)) for tensors in loaded]
        self.size = len(self.shards[0].indices)  # of all but perhaps the last
        self.num_images = sum(len(shard.indices) for shard in self.shards)

    def rows(self, chosen: Tensor) -> TargetImages:
        """Images by number `[b]`."""
        found = [
            self.shards[i // self.size].rows(slice(i % self.size, i % self.size + 1)) for i in chosen.tolist()
        ]
        names = ("indices", "features", "law_tokens", "law_probs")
        return TargetImages(*(torch.cat([getattr(one, name) for one in found]) for name in names))


def load_or_make(making: Making, condition: Tensor, folder: Path, images_per_shard: int) -> TargetShards:
    """Images of all rows of `condition`, from `folder` as far as they were made before.

    A shard is written whole or not at all, so that an interrupted run goes on with the next one. Shards of another target,
    of other settings or conditions are made anew.

    Args:
        making: how.
        condition: one row per image.
        folder: holds `shard-00000.safetensors` and so on; made if it does not exist.
        images_per_shard: in each file but the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "target": model_identity(making.target),
        "settings": repr(making.settings),
        "kept": f"prefix {making.prefix_length}, law {making.law_size}",
    }
    files = []
    starts = range(0, len(condition), images_per_shard)
    for number, start in enumerate(tqdm(starts, desc="images of the target", unit="shard")):
        rows = condition[start : start + images_per_shard]
        origin = shared | {
            "first": str(start),
            "condition": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        }
        files.append(folder / f"shard-{number:05}.safetensors")
        if not _is_made(files[-1], origin):
            tensors = _shard(making, rows, start)
            with atomic_path(files[-1]) as partial:
                save_file(tensors, partial, origin)
    return TargetShards(files)


def _is_made(path: Path, origin: dict[str, str]) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == origin
    except SafetensorError:
        return False


@torch.inference_mode()
def _shard(making: Making, condition: Tensor, first: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(condition), BATCH_SIZE):
        rows = condition[start : start + BATCH_SIZE]
        made = making.images(rows, list(range(first + start, first + start + len(rows))))
        parts["indices"].append(made.indices.int())
        parts["features"].append(made.features.half())
        parts["law_tokens"].append(made.law_tokens.int())
        parts["law_probs"].append(made.law_probs.half())
    return {name: torch.cat(values).cpu().contiguous() for name, values in parts.items()}


def make_conditions(target: NextTokenGenerator, prompts: Path | None, count: int, seed: int) -> Tensor:
    """What `count` images are drawn from: the classes in turn, or prompts at random.

    Args:
        target: conditioned on classes, or on texts that it reads itself.
        prompts: of a text target: the folder of the emoji set, or a text file with a prompt in every line.
        count: rows.
        seed: of the choice.

    Raises:
        ValueError: a text target without prompts, prompts for a class target, a target that reads features of texts.
        FileNotFoundError: there are no prompts at the path.
    """
    num_classes = getattr(target, "num_classes", None)
    if num_classes is not None:
        if prompts is not None:
            raise ValueError(f"{type(target).__name__} is conditioned on classes: leave out prompts")
        return torch.arange(count) % num_classes
    if not hasattr(target, "encode_text"):
        raise ValueError(
            f"{type(target).__name__} reads features of texts; drafters are trained for targets of classes or of plain texts"
        )
    if prompts is None:
        raise ValueError(
            "a target that reads texts needs prompts: the emoji set's folder or a file with one in every line"
        )
    chance = random.Random(seed)
    texts = _emoji_texts(prompts, count, chance) if prompts.is_dir() else _file_texts(prompts, count, chance)
    longest: int = target.config["text_length"]
    return target.encode_text([text.encode()[:longest].decode(errors="ignore") for text in texts])


def _file_texts(path: Path, count: int, chance: random.Random) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts {path} do not exist; name the emoji set's folder or a text file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return chance.choices(lines, k=count)


def _emoji_texts(folder: Path, count: int, chance: random.Random) -> list[str]:
    """Names drawn evenly, then one picture of each and one of its captions."""
    by_name: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in read_index(folder):
        by_name[emoji.name].append(emoji)
    names, colors = list(by_name), sorted(COLORS)
    texts = []
    for _ in range(count):
        emoji = chance.choice(by_name[chance.choice(names)])
        is_colored = can_turn_hue(emoji) and chance.random() < COLORED
        texts.append(chance.choice(captions(emoji, chance.choice(colors) if is_colored else None)))
    return texts
