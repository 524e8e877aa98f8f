"""Weights of fewer bits: int8 with torchao, for less memory and less to read at every step.

A token of one image is as slow as reading all weights, and most of them lie in the linear layers of the repeated blocks.
These become int8 with one float32 scale for every output channel, symmetric around 0: a row of weights w is stored as
round(w / s) with s = max |w| / 127 (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1, with zero point 0). Activations stay as they are. Everything else keeps
its precision: embeddings and convolutions, norms, what enters the blocks once per image, and the head, whose error would
go straight into the probabilities of the next token.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from torch import nn

from vistok.models.identity import model_identity

QUANTIZATIONS = ("int8",)
FEWEST_WEIGHTS = 2**12  # of a layer that is worth it; smaller ones are read in no time
Model = TypeVar("Model")  # an `nn.Module`, which mypy cannot see in diffusers' classes


def quantize_weights(model: Model, quantization: str = "int8") -> Model:
    """Store the weights of a model's blocks in fewer bits, in place, for inference.

    The device can still be changed, the dtype cannot: choose it first. Such a model is not saved, and it has the
    identity of the original, from which it is made in seconds. Without `torch.compile` the weights of a layer are
    widened whenever it computes, which saves memory and costs time.

    Args:
        model: a generator or tokenizer, in the dtype to compute in.
        quantization: one of QUANTIZATIONS.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown quantization, a model that is quantized already, or one without large linear layers.
        ModuleNotFoundError: torchao is not installed.
    """
    check_quantization(quantization)
    module: Any = model
    name = type(module).__name__
    if getattr(module, "is_quantized", False):
        raise ValueError(f"this {name} is quantized already; load it again for another quantization")
    layers = large_layers(module)
    if not layers:
        raise ValueError(f"{name} has no linear layers of {FEWEST_WEIGHTS} weights in its blocks to quantize")
    quantize_, config = _torchao()
    identity = model_identity(module)
    quantize_(module, config, lambda _, layer_name: layer_name in layers)
    module.is_quantized = True  # diffusers then refuses to change the dtype
    module.original_identity = identity
    module.save_pretrained = _refuse_to_save
    return model


def check_quantization(quantization: str) -> None:
    """Raises ValueError unless `quantization` is one of QUANTIZATIONS."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"unknown quantization {quantization!r}; choose one of {', '.join(QUANTIZATIONS)}, or none"
        )


def large_layers(model: nn.Module) -> set[str]:
    """The names of the linear layers in the repeated blocks of a model that `quantize_weights` is about."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.numel() >= FEWEST_WEIGHTS
        and any(name.startswith(block) for block in blocks)
    }


def _torchao() -> tuple[Any, Any]:
    """torchao's function and its description of int8 weights."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "int8 weights need torchao: run `pip install 'vistok[quant]'`, or use dtype bfloat16"
        ) from None
    return quantize_, Int8WeightOnlyConfig()


def _refuse_to_save(*args: Any, **options: Any) -> NoReturn:
    raise ValueError(
        "quantized weights are not saved: save the model as it is before quantize_weights, and quantize it when it is "
        "loaded, vistok.load(..., quantization='int8')"
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes that the weights and buffers of a model take, quantized or not."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    parts = [(x.qdata, x.scale) if hasattr(x, "qdata") else (x,) for x in tensors]
    return sum(part.numel() * part.element_size() for group in parts for part in group)
