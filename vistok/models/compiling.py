"""The networks of generators that decide in no fixed order, and of tokenizers, compiled in place: `compile_model(model)`.

Each of them is asked again and again by a loop that stays as it is: `FAMILIES` says which methods the loop calls. Steps of
generators with a fixed order need more than that, see `vistok.decoding.compiled`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vistok.kernels.inductor import compiler_settings
from vistok.models.generators.any_order import AnyOrderMasked
from vistok.models.generators.base import MaskedGenerator
from vistok.models.generators.mar import MAR
from vistok.models.generators.xar import XAR, Span
from vistok.models.tokenizers.flextok import FlexTok, Registers
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vistok.models.tokenizers.titok import TiTok
from vistok.models.tokenizers.vqgan import VQGAN
from vistok.tokens import Tokens

SHORTEST_BUCKET = 32  # tokens of an image, of which the decoder of FlexTok is compiled for powers of two


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True)
class Method:
    """A method that a loop calls.

    Args:
        path: from the model, `"decoder.velocity"`.
        is_static: its arguments have few shapes, each of which gets a program of its own; if not, two programs serve all.
        writes: it writes to its arguments, as to a cache, which a CUDA graph that is replayed could not follow.
        takes: whether a call with such arguments runs compiled; others run as before.
    """

    path: str
    is_static: bool = True
    writes: bool = False
    takes: Callable[..., bool] = _always


@dataclass(frozen=True)
class Family:
    """What is compiled of a class of models.

    Args:
        methods: those that loops call.
        warm_up: calls them with everything that a loop calls them with: of a model, for so many images, guided or not.
    """

    methods: tuple[Method, ...]
    warm_up: Callable[[Any, int, bool], None]


class CompiledModel:
    """A model whose methods were compiled in place; `undo` takes it back.

    The first call of a kind (rows, tokens per step) compiles, which takes from seconds to minutes, and the later ones reuse
    that. Calls that need gradients run as before. On a CPU the weights are copied, packed as its matrix products want them:
    what is changed in the model later has no effect.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.model = model
        self.family = family
        self._replaced: list[tuple[Any, str]] = []
        is_cuda = model.device.type == "cuda"
        for method in family.methods:
            *owners, name = method.path.split(".")
            owner = functools.reduce(getattr, owners, model)
            self._replace(owner, name, _Program(getattr(owner, name), method, is_cuda))
        if isinstance(model, FlexTok):
            self._replace(model.decoder, "kept_registers", _Bucketed(model.decoder.kept_registers))

    @torch.no_grad()
    def warm_up(self, batch_size: int = 1, *, is_guided: bool = True) -> None:
        """Compile everything that drawing, or decoding, so many images needs, with guidance or without."""
        self.family.warm_up(self.model, batch_size, is_guided)

    def undo(self) -> None:
        """Run uncompiled again."""
        for owner, name in self._replaced:
            delattr(owner, name)
        self._replaced.clear()

    def _replace(self, owner: Any, name: str, program: Callable[..., Any]) -> None:
        if name in vars(owner):
            raise ValueError(f"this {type(self.model).__name__} is compiled already; undo that before")
        setattr(owner, name, program)
        self._replaced.append((owner, name))


def compile_model(model: Any) -> CompiledModel:
    """Compile, in place, what loops call of a model again and again; do it where, and as precise as, it will run.

    Args:
        model: a masked generator, an xAR, a MAR, or a tokenizer with a decoder that is worth it; in evaluation mode.

    Raises:
        ValueError: this model has nothing that can be compiled, or is compiled already.
    """
    for kind, family in FAMILIES.items():
        if isinstance(model, kind):
            return CompiledModel(model, family)
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise ValueError(f"{type(model).__name__} has no methods that can be compiled; those of {known} can")


class _Program:
    """One method, compiled: with packed weights on a CPU ("freezing"), as CUDA graphs on a GPU where it can be."""

    def __init__(self, eager: Callable[..., Any], method: Method, is_cuda: bool) -> None:
        self.eager = eager
        self.method = method
        self.is_graph = is_cuda and not method.writes
        self.is_cuda = is_cuda
        self._compiled = torch.compile(
            eager,
            fullgraph=True,
            dynamic=False if method.is_static else None,
            mode="reduce-overhead" if self.is_graph else None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not self.method.takes(*args, **kwargs):
            return self.eager(*args, **kwargs)
        with compiler_settings(packs_weights=not self.is_cuda):
            if not self.is_graph:
                return self._compiled(*args, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            # The next replay overwrites what this one returns.
            return tree_map_only(Tensor, Tensor.clone, self._compiled(*args, **kwargs))


class _Bucketed:
    """`FlexTokDecoder.kept_registers` with lengths rounded up; registers beyond an image's length are all the same."""

    def __init__(self, kept_registers: Callable[[Tensor, Tensor], Registers]) -> None:
        self._kept_registers = kept_registers
        self._num_tokens: int = kept_registers.__self__.num_tokens  # type: ignore[attr-defined]

    def __call__(self, codes: Tensor, lengths: Tensor) -> Registers:
        bucket = min(self._num_tokens, max(SHORTEST_BUCKET, 1 << (codes.shape[1] - 1).bit_length()))
        return self._kept_registers(F.pad(codes, (0, 0, 0, bucket - codes.shape[1])), lengths)


def _has_no_cache(hidden_states: Tensor, cache: Any = None, num_last: int | None = None) -> bool:
    return cache is None


def _has_no_evaluation(indices: Tensor, class_labels: Tensor, evaluation: Any = None) -> bool:
    return evaluation is None


def _has_no_features(embedded: Tensor, rotation: Any, mask: Any, cache: Any = None) -> bool:
    return cache is None


def _has_one_step(latents: Tensor, span: Span, modulations: Any, cache: Any) -> bool:
    return span.mask is None


def _has_one_length(codes: Tensor, lengths: Any = None) -> bool:
    return lengths is None


def _with_branches(draw: Callable[[Any, int], None]) -> Callable[[Any, int, bool], None]:
    """Of a generator: guidance doubles the rows of the steps that are guided."""

    def warm_up(model: Any, batch_size: int, is_guided: bool) -> None:
        for branches in (1, 2) if is_guided else (1,):
            draw(model, branches * batch_size)

    return warm_up


def _draw_masked(model: MaskedGenerator, rows: int) -> None:
    canvas = torch.full((rows, model.num_tokens), model.mask_token_id, device=model.device)
    model(canvas, torch.full((rows,), model.null_label, device=model.device))


def _draw_steps(model: XAR, rows: int) -> None:
    """As `generate_flow`: the first call of a step feeds the tokens of the step before, too."""
    labels = torch.full((rows,), model.null_label, device=model.device)
    one, two = (model.modulate(torch.ones(rows, count, device=model.device), labels) for count in (1, 2))
    cache = model.new_cache(rows)
    before: list[Tensor] = []
    for positions in model.order.plan():
        latents = torch.zeros(rows, len(positions), model.latent_dim, device=model.device)
        if before:
            model.velocity(torch.cat([*before, latents], dim=1), two, cache)
        model.velocity(latents, one, cache)
        before = [latents]


def _draw_sets(model: MAR, rows: int) -> None:
    """As `generate_mar`: ever more tokens decided, and different numbers of them asked for."""
    positions = torch.arange(model.num_tokens, device=model.device).expand(rows, -1)
    labels = torch.full((rows,), model.null_label, device=model.device)
    for num_decided, num_asked in ((0, 1), (1, 2), (2, 3)):
        decided, hidden = positions[:, :num_decided], positions[:, num_decided:]
        num_asked = min(num_asked, hidden.shape[1])
        latents = torch.zeros(*decided.shape, model.latent_dim, device=model.device)
        features = model.encode(latents, decided, labels)
        conditions = model.decode(features, decided, hidden, num_last=num_asked)
        embedded = model.denoiser.embed_conditions(conditions)
        times = torch.zeros(rows, num_asked, dtype=torch.int64, device=model.device)
        noisy = torch.zeros(rows, num_asked, model.latent_dim, device=model.device)
        model.denoiser.denoise(noisy, model.denoiser.modulate(embedded, times))


def _decode_lengths(model: FlexTok, batch_size: int, is_guided: bool) -> None:
    lengths = [model.num_tokens]
    while lengths[-1] > SHORTEST_BUCKET:
        lengths.append(1 << (lengths[-1] - 1).bit_length() - 1)  # the power of two below
    for length in lengths:
        indices = torch.zeros(batch_size, length, dtype=torch.int64, device=model.device)
        tokens = Tokens(indices=indices, codebook_size=model.codebook_size)
        model.decode(tokens, num_inference_steps=2, guidance_scale=2.0 if is_guided else 1.0)


def _decode(model: Any, batch_size: int, is_guided: bool) -> None:
    """Tokens of zeros, of any other tokenizer."""
    shape = (batch_size, model.num_tokens)
    if model.codebook_size is None:
        tokens = Tokens(latents=torch.zeros(*shape, model.latent_channels), layout=model.layout)
    else:
        indices = torch.zeros(shape, dtype=torch.int64)
        tokens = Tokens(indices=indices, codebook_size=model.codebook_size, layout=model.layout)
    model.decode(tokens.to(model.device))


FAMILIES: dict[type, Family] = {
    AnyOrderMasked: Family(
        (Method("trunk", takes=_has_no_features), Method("logits")), _with_branches(_draw_masked)
    ),
    MaskedGenerator: Family((Method("forward", takes=_has_no_evaluation),), _with_branches(_draw_masked)),
    XAR: Family(
        (Method("stacks", is_static=False, writes=True, takes=_has_one_step),), _with_branches(_draw_steps)
    ),
    MAR: Family(
        (
            Method("encoder.forward", is_static=False, takes=_has_no_cache),
            Method("decoder.forward", is_static=False, takes=_has_no_cache),
            Method("denoiser.denoise", is_static=False),
        ),
        _with_branches(_draw_sets),
    ),
    FlexTok: Family(
        (
            Method("decoder.velocity"),
            Method("decoder.velocities"),
            Method("vae.autoencoder.decoder.forward"),
        ),
        _decode_lengths,
    ),
    TiTok: Family(
        (Method("decoder.forward", takes=_has_one_length), Method("pixel_decoder.forward")), _decode
    ),
    MaskGITVQGAN: Family((Method("decoder.forward"),), _decode),
    VQGAN: Family((Method("decoder.forward"),), _decode),
    KLTokenizer: Family((Method("autoencoder.decoder.forward"),), _decode),
}
