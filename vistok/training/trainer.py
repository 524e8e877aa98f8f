"""One training loop for every task: AdamW, warm-up and cosine, EMA, bf16 autocast, clipping, exact resumption."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vistok.files import atomic_path
from vistok.kernels.attention import attention_backend
from vistok.training.ema import EMA
from vistok.training.recipe import Optimization, Recipe

UNDECAYED = ("embed", "position", "latents", "denoiser")  # words in the names of parameters

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What differs between trainings. A batch depends on nothing but its generator, so any step can be repeated."""

    model: Any  # the diffusers model being trained

    def batch(self, batch_size: int, generator: torch.Generator) -> Any:
        """Training data of one step."""
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Scalar loss and what to log beside it."""
        ...

    def evaluate(self, model: Any) -> dict[str, float]:
        """Held-out measurements of `model`, the averaged weights."""
        ...

    def finish(self, model: Any) -> None:
        """Set what the trained `model` should know of its data before it is saved; nothing by default."""
        return


def train(task: Task, recipe: Recipe, folder: Path, *, device: torch.device) -> dict[str, float]:
    """Train `task.model` and save the averaged weights in `folder/model`; continues from `folder/checkpoint.pt`.

    Interrupting and continuing gives the same weights as an uninterrupted run on the same machine.

    Returns:
        The held-out measurements of the averaged weights.

    Raises:
        ValueError: `folder` holds a checkpoint of another recipe.
        FloatingPointError: the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = recipe.optimization
    model = task.model.to(device).train()
    optimizer = make_optimizer(model, options)
    ema = EMA(model, options.ema_decay)
    start = _resume(folder / "checkpoint.pt", recipe, model, optimizer, ema)
    _cut_log(folder / "metrics.jsonl", start)
    measured: dict[str, float] = {}
    progress = tqdm(range(start, options.num_steps), initial=start, total=options.num_steps, unit="step")
    for step in progress:
        lr = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logs = _step(task, optimizer, ema, recipe, step, device)
        done = step + 1
        if done % recipe.log_every == 0 or done == options.num_steps:
            values = {name: float(value) for name, value in logs.items()}
            progress.set_postfix(values)
            _log(folder / "metrics.jsonl", {"step": done, "lr": lr, **values})
        if done % recipe.checkpoint_every == 0 or done == options.num_steps:
            measured = task.evaluate(_averaged(model, ema))
            _log(folder / "metrics.jsonl", {"step": done, **measured})
            logger.info("step %d: %s", done, measured)
            _save(folder / "checkpoint.pt", recipe, done, model, optimizer, ema)
    averaged = _averaged(model, ema)
    task.finish(averaged)
    with atomic_path(folder / "model") as partial:
        averaged.save_pretrained(partial)
    return measured or task.evaluate(averaged)  # a finished run that is repeated has not been measured yet


def _step(
    task: Task, optimizer: torch.optim.Optimizer, ema: EMA, recipe: Recipe, step: int, device: torch.device
) -> dict[str, float | Tensor]:
    options = recipe.optimization
    generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
    torch.manual_seed((recipe.seed << 32) + step)  # dropout inside models draws from torch's own generator
    batch = task.batch(options.batch_size, generator)
    # On a CPU the backward pass of the plain attention is faster than SDPA's for sequences this short.
    plain = attention_backend("reference") if device.type == "cpu" else contextlib.nullcontext()
    with plain:
        with autocast(device, options.autocast):
            loss, logs = task.loss(batch)
        _check_finite(loss, step)
        loss.backward()
    norm = nn.utils.clip_grad_norm_(task.model.parameters(), options.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    ema.update(task.model)
    return {"loss": loss.detach(), "grad_norm": norm, **logs}


def _check_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the learning rate")


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def make_optimizer(model: nn.Module, options: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay on parameters of two or more axes; not on embeddings, positions and MAR's head."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(word in name for word in UNDECAYED)
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def learning_rate(step: int, options: Optimization) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr` at the last step."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.num_steps - options.warmup_steps)
    return options.final_lr + (options.lr - options.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def _averaged(model: Any, ema: EMA) -> Any:
    averaged = copy.deepcopy(model).eval()
    ema.copy_to(averaged)
    return averaged


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    if json.loads(state["recipe"]) != json.loads(json.dumps(recipe.to_dict())):
        raise ValueError(f"{path} belongs to another recipe; choose another output folder or remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    logger.info("continuing from step %d", state["step"])
    return state["step"]


def _save(
    path: Path, recipe: Recipe, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    with atomic_path(path) as partial:
        state = {
            "step": step,
            "recipe": json.dumps(recipe.to_dict()),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
        }
        torch.save(state, partial)


def _cut_log(path: Path, start: int) -> None:
    """Drop lines that an interrupted run wrote after its last checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= start]
    path.write_text("".join(line + "\n" for line in kept))


def _log(path: Path, values: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")
