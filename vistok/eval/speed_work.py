"""Bytes and floating-point operations of drawing and decoding: what every implementation has to do at least.

Bytes are the weights of a pass, the keys and values that it reads, and its logits. Operations are those of linear layers and
of both products of attention, over all pairs, masked or not. Both branches of guidance count where they are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from vistok.decoding.guidance import GuidanceSchedule
from vistok.decoding.mar_sampling import hidden_counts
from vistok.eval.speed_floor import Pass
from vistok.kernels.attention import attention_backend
from vistok.models.generators.base import OrderedGenerator
from vistok.models.generators.flex_ar import FlexAR, FlexARText
from vistok.models.generators.llamagen import GridTransformer, LlamaGen, TextPrefix
from vistok.models.generators.mar import MAR, MARBlock
from vistok.models.generators.maskgit import MaskGIT
from vistok.models.generators.nar import NAR
from vistok.models.generators.text_ar import TEXT_STRIDE, TextAR
from vistok.models.generators.xar import XAR

LOGIT_BYTES = 4  # float32


def weight_bytes(*parts: nn.Module) -> int:
    """Bytes of the weights of modules, all but the tables of embeddings, of which a pass looks up some rows."""
    modules = [module for part in parts for module in part.modules()]
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    tensors = (tensor for part in parts for tensor in itertools.chain(part.parameters(), part.buffers()))
    return sum(tensor_bytes(tensor) for tensor in tensors if id(tensor) not in tables)


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of those that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(tensor_bytes(getattr(tensor, part)) for part in parts)


def linear_size(*parts: nn.Module) -> int:
    """Numbers in the matrices of all linear layers; a position costs two operations for each."""
    modules = (module for part in parts for module in part.modules())
    return sum(m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class OrderedSizes:
    """What a forward of an ordered generator costs.

    Args:
        depth: layers.
        dim, kv_dim: width of the queries and of the keys of all heads.
        prefix_length: positions of the condition, fed before all tokens.
        once: modules that only the condition goes through.
        matrices, weights: numbers in the matrices of a block stack and its head, and their bytes.
        head: numbers of `matrices` that only positions with logits meet.
        text_length: keys of a cross-attention.
    """

    depth: int
    dim: int
    kv_dim: int
    prefix_length: int
    once: list[nn.Module]
    matrices: int
    weights: int
    head: int
    text_length: int = 0


def _grid_sizes(model: GridTransformer) -> OrderedSizes:
    heads = [model.right_head, model.below_head] if isinstance(model, NAR) else []
    norms = [model.right_norm, model.below_norm] if isinstance(model, NAR) else []
    if isinstance(model, LlamaGen):
        heads, norms = [model.head], [model.norm]
    return OrderedSizes(
        depth=len(model.blocks),
        dim=model.options.dim,
        kv_dim=model.options.kv_heads * model.options.head_dim,
        prefix_length=model.prefix.length,
        once=[model.prefix.fc1, model.prefix.fc2] if isinstance(model.prefix, TextPrefix) else [],
        matrices=linear_size(model.blocks),
        weights=weight_bytes(model.blocks, *norms, *heads),
        head=linear_size(*heads),
    )


def _text_ar_sizes(model: TextAR) -> OrderedSizes:
    table = model.token_embed.weight  # which is the head as well
    dim = table.shape[1]
    return OrderedSizes(
        depth=len(model.blocks),
        dim=dim,
        kv_dim=dim,
        prefix_length=model.text_length // TEXT_STRIDE + 1,
        once=[model.text_encoder],
        matrices=linear_size(model.blocks),
        weights=weight_bytes(model.blocks, model.norm) + table.nbytes,
        head=table.numel(),
    )


def _flex_ar_sizes(model: FlexAR, text_length: int) -> OrderedSizes:
    once: list[nn.Module] = []
    if isinstance(model, FlexARText):
        crossings: list[Any] = [block.cross_attn for block in model.blocks]
        once = [model.text_proj, *(layer for one in crossings for layer in (one.key, one.value))]
    dim = model.config["dim"]
    keys_and_values = once[1:]
    return OrderedSizes(
        depth=len(model.blocks),
        dim=dim,
        kv_dim=dim,
        prefix_length=1,
        once=once,
        matrices=linear_size(model.blocks) - linear_size(*keys_and_values),
        weights=weight_bytes(model.blocks, model.out_norm, model.head) - weight_bytes(*keys_and_values),
        head=linear_size(model.head),
        text_length=text_length if once else 0,
    )


def ordered_sizes(model: OrderedGenerator, text_length: int = 0) -> OrderedSizes:
    """The sizes of a generator, conditioned on texts of `text_length` positions; raises ValueError where unknown."""
    if isinstance(model, GridTransformer):
        return _grid_sizes(model)
    if isinstance(model, TextAR):
        return _text_ar_sizes(model)
    if isinstance(model, FlexAR):
        return _flex_ar_sizes(model, text_length)
    raise ValueError(f"the work of {type(model).__name__} is not known")


def cache_bytes(model: OrderedGenerator, batch_size: int, num_tokens: int) -> int:
    """Keys and values of a condition and the first tokens, both branches of guidance."""
    sizes = ordered_sizes(model)
    item = torch.empty((), dtype=model.dtype).element_size()
    return 4 * batch_size * sizes.depth * sizes.kv_dim * item * (sizes.prefix_length + num_tokens)


def ordered_passes(
    model: OrderedGenerator, batch_size: int, num_steps: int, *, text_length: int = 0
) -> list[Pass]:
    """Of the first `num_steps` steps, guided: the condition, then the tokens of every step but the last.

    Args:
        model: the generator, of the type that it is timed in.
        batch_size: images.
        num_steps: of its order.
        text_length: positions of a text that a cross-attention reads.
    """
    sizes, rows, length = ordered_sizes(model, text_length), 2 * batch_size, 0
    item = torch.empty((), dtype=model.dtype).element_size()

    def forward(num_new: int, num_logits: int) -> Pass:
        nonlocal length
        length += num_new
        cached = 2 * sizes.depth * item * (sizes.kv_dim * length + sizes.dim * sizes.text_length)
        pairs = num_new * (length + sizes.text_length)
        flops = 2 * (sizes.matrices * num_new + sizes.head * num_logits) + 4 * sizes.depth * sizes.dim * pairs
        logits = LOGIT_BYTES * num_logits * model.codebook_size
        return Pass(sizes.weights + rows * (cached + logits), rows * flops)

    first = forward(sizes.prefix_length, 1)
    fed = [len(positions) for positions in model.order.plan()[: num_steps - 1]]
    passes = [first, *(forward(count, count) for count in fed)]
    if not sizes.once:
        return passes
    read = sizes.text_length or sizes.prefix_length
    return [Pass(weight_bytes(*sizes.once), 2 * rows * read * linear_size(*sizes.once)), *passes]


def masked_passes(model: MaskGIT, batch_size: int, num_steps: int, guidance: GuidanceSchedule) -> list[Pass]:
    """Of all steps; where guidance is off, of one branch."""
    length, dim = model.num_tokens + 1, model.config["dim"]
    head = model.head
    assert isinstance(head, nn.Module)
    matrices, of_head = linear_size(model) - linear_size(head), linear_size(head)
    flops = 2 * (matrices * length + of_head * model.num_tokens) + 4 * model.num_blocks * dim * length**2
    logits = LOGIT_BYTES * model.num_tokens * model.codebook_size
    branches = [1 if guidance.at(step, num_steps) == 1.0 else 2 for step in range(num_steps)]
    rows = [count * batch_size for count in branches]
    return [Pass(weight_bytes(model) + count * logits, count * flops) for count in rows]


def flow_passes(
    model: XAR, batch_size: int, num_inference_steps: int, guidance: GuidanceSchedule
) -> list[Pass]:
    """Of xAR with a class of its own for every image: modulations once per class and time, then all evaluations."""
    blocks: list[Any] = [*model.encoder.blocks, *model.decoder.blocks]
    conditioning = [model.time_embed, *(block.modulation for block in blocks)]
    matrices = linear_size(model) - linear_size(*conditioning, model.to_velocity)
    weights = weight_bytes(model) - weight_bytes(*conditioning)
    modulated = (batch_size + 1) * (num_inference_steps + 1)
    item, dim = torch.empty((), dtype=model.dtype).element_size(), model.config["dim"]
    passes = [Pass(weight_bytes(*conditioning), 2 * modulated * linear_size(*conditioning))]
    plan, end = [len(positions) for positions in model.order.plan()], 0
    for step, size in enumerate(plan):
        end += size
        is_guided = guidance.at(step, len(plan)) != 1.0
        context = plan[step - 1] if step else 0  # the first evaluation also feeds what was decided last
        for count, num_new, is_both in (
            (1, size + context, is_guided or step > 0),
            (num_inference_steps - 1, size, is_guided),
        ):
            rows = batch_size * (2 if is_both else 1)
            flops = 2 * (matrices * num_new + linear_size(model.to_velocity) * size)
            flops += 4 * len(blocks) * dim * num_new * end
            passes.append(
                Pass(weights + rows * 2 * len(blocks) * dim * end * item, rows * flops, count=count)
            )
    return passes


def mar_passes(model: MAR, batch_size: int, num_steps: int, num_inference_steps: int) -> list[Pass]:
    """Of MAR, guided at all steps: encoder and decoder, the modulations of the head, and its denoising steps."""
    rows, hidden = 2 * batch_size, [model.num_tokens, *hidden_counts(model.num_tokens, num_steps)]
    hidden[-1] = 0  # the last step decides all that is left
    passes = []
    for before, after in itertools.pairwise(hidden):
        num_last = before - after
        passes += [
            Pass(_encoder_bytes(model), rows * _encoder_flops(model, model.num_tokens - before)),
            Pass(
                weight_bytes(model.between, model.decoder),
                rows * _decoder_flops(model, model.num_tokens - before, num_last),
            ),
            *_denoiser_passes(model, rows * num_last, num_inference_steps),
        ]
    return passes


def _encoder_bytes(model: MAR) -> int:
    return weight_bytes(model.latent_embed, model.latent_norm, model.encoder)


def _encoder_flops(model: MAR, num_decided: int) -> int:
    """Of one row."""
    length = model.num_buffer_tokens + num_decided
    linear = linear_size(model.latent_embed) * num_decided + linear_size(model.encoder) * length
    return 2 * linear + 4 * len(model.encoder.blocks) * model.config["dim"] * length**2


def _decoder_flops(model: MAR, num_decided: int, num_last: int) -> int:
    """Of one row; what the last block makes of others than the `num_last`, nobody reads."""
    dim, depth = model.config["dim"], len(model.decoder.blocks)
    length = model.num_buffer_tokens + model.num_tokens
    last = model.decoder.blocks[-1]
    assert isinstance(last, MARBlock)
    of_all = linear_size(last.attn.qkv)
    linear = linear_size(model.between) * (model.num_buffer_tokens + num_decided)
    linear += (linear_size(model.decoder) - linear_size(last) + of_all) * length
    linear += (linear_size(last) - of_all) * num_last
    return 2 * linear + 4 * dim * length * ((depth - 1) * length + num_last)


def _denoiser_passes(model: MAR, num_tokens: int, num_inference_steps: int) -> list[Pass]:
    """Of `num_tokens` tokens, both branches counted, through all denoising steps."""
    head = model.denoiser
    modulations = [*head.block_modulations, head.output_modulation]
    trunk = [head.input, head.blocks, head.output]
    conditioning = linear_size(head.condition_embed) * num_tokens
    conditioning += linear_size(head.time_embed) * num_inference_steps
    conditioning += linear_size(*modulations) * num_tokens * num_inference_steps
    return [
        Pass(weight_bytes(head.condition_embed, head.time_embed, *modulations), 2 * conditioning),
        Pass(weight_bytes(*trunk), 2 * num_tokens * linear_size(*trunk), count=num_inference_steps),
    ]


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of a call by torch's own counter, attention written out so that it sees both products."""
    with attention_backend("reference"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def modules_called(model: Any, call: Callable[[], Any]) -> list[nn.Module]:
    """The modules that a call goes through, each once, without the tables of embeddings."""
    called: dict[int, nn.Module] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.update({id(module): module}))
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return list(called.values())


def own_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the weights of modules themselves, without those of the modules within them."""
    tensors = (
        tensor
        for module in modules
        for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    )
    return sum(map(tensor_bytes, tensors))


def mean_of(passes: Sequence[Pass], name: str) -> float:
    """The mean of `"bytes"` or `"flops"` over all runs of all passes."""
    return sum(one.count * getattr(one, name) for one in passes) / sum(one.count for one in passes)
