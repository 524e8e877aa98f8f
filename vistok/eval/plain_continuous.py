"""The plain way to draw from continuous generators: everything anew in every step, nothing kept.

The same modules on the same noise as `generate_flow` and `generate_mar`, whose tokens these ways give, and against which
`continuous_speed` times them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.decoding.guidance import GuidanceSchedule, apply_guidance
from vistok.decoding.mar_sampling import Source, both_branches, empty_canvas, make_plan, put
from vistok.decoding.streams import NormalSource, StepNoise
from vistok.kernels.attention import KeyMask
from vistok.models.generators.mar import MAR, MARBlock, take
from vistok.models.generators.xar import XAR
from vistok.models.heads.base import Predict


@torch.no_grad()
def plain_flow(
    model: XAR,
    class_labels: Tensor,
    *,
    streams: NormalSource,
    num_inference_steps: int,
    guidance: GuidanceSchedule,
) -> Tensor:
    """What `generate_flow` draws, `[b n c]`: every call is fed all steps of the order so far, in both branches."""
    labels = torch.cat([class_labels, torch.full_like(class_labels, model.null_label)])  # [2b]
    plan = model.order.plan()
    latents = torch.zeros(len(class_labels), model.num_tokens, model.latent_dim, device=model.device)
    for step, positions in enumerate(plan):
        decided = latents[:, torch.cat([positions[:0], *plan[:step]])]
        predict = _plain_velocity(model, labels, decided, step, guidance.at(step, len(plan)))
        noise = StepNoise(streams, (len(positions), model.latent_dim), model.device)
        drawn = model.head.sample(predict, noise, num_inference_steps=num_inference_steps)  # [b k c]
        latents[:, positions] = drawn.to(latents.dtype)
    return latents / model.latent_scale


def _plain_velocity(model: XAR, labels: Tensor, decided: Tensor, step: int, scale: float) -> Predict:
    def predict(noisy: Tensor, time: float) -> Tensor:
        times = torch.zeros(len(labels), step + 1, device=noisy.device)
        times[:, step] = time
        tokens = torch.cat([decided, noisy.float()], dim=1).repeat(2, 1, 1)
        cond, uncond = model.velocity(tokens, model.modulate(times, labels)).double().chunk(2)
        return apply_guidance(cond, uncond, scale)

    return predict


class PlainMAR:
    """MAR over all positions in every step: what is hidden is masked in the encoder, a mask token in the decoder.

    Args:
        model: the network.
        every: only the one in the middle of so many steps is done, to time a share of the work.
    """

    def __init__(self, model: MAR, every: int = 1) -> None:
        self.model = model
        self.every = every

    @torch.no_grad()
    def generate(
        self,
        class_labels: Tensor,
        *,
        streams: Source,
        num_steps: int,
        num_inference_steps: int,
        guidance: GuidanceSchedule,
    ) -> Tensor:
        """What `generate_mar` draws, `[b n c]`."""
        model = self.model
        plan = make_plan(model, len(class_labels), num_steps, None, streams)
        scales = plan.scales(guidance)
        labels = both_branches(model, class_labels, None, scales)  # [2b]
        latents = empty_canvas(model, len(class_labels))
        for step in range(self.every // 2, num_steps, self.every):
            start, end = plan.spans[step]
            positions = plan.sequence[:, start:end]
            is_hidden = torch.ones_like(plan.sequence, dtype=torch.bool)
            is_hidden = is_hidden.scatter(1, plan.sequence[:, :start], False).repeat(2, 1)  # [2b n]
            features = self.encode(latents.repeat(2, 1, 1), labels, is_hidden)
            conditions = take(self.decode(features, is_hidden), positions.repeat(2, 1))  # [2b k d]
            noise = StepNoise(streams, (end - start, model.latent_dim), model.device)
            predict = _plain_denoiser(model, conditions, scales[step])
            drawn = model.head.sample(predict, noise, num_inference_steps=num_inference_steps)
            latents = put(latents, positions, drawn)
        return latents / model.latent_scale

    def encode(self, latents: Tensor, labels: Tensor, is_hidden: Tensor) -> Tensor:
        """`latents [r n c]`, `labels [r]`, `is_hidden [r n]` -> `[r s+n d]`; what it says of hidden ones is not read."""
        model = self.model
        buffer = model.class_embed(labels)[:, None].expand(-1, model.num_buffer_tokens, -1)
        hidden_states = torch.cat([buffer, model.latent_embed(latents.to(model.dtype))], dim=1)
        hidden_states = model.latent_norm(hidden_states + model.encoder.position_embed)
        mask = KeyMask(F.pad(~is_hidden, (model.num_buffer_tokens, 0), value=True))
        for block in model.encoder.blocks:
            assert isinstance(block, MARBlock)
            hidden_states = hidden_states + block.attn(block.norm1(hidden_states), mask)
            hidden_states = hidden_states + block.fc2(F.gelu(block.fc1(block.norm2(hidden_states))))
        return model.encoder.norm(hidden_states)

    def decode(self, features: Tensor, is_hidden: Tensor) -> Tensor:
        """`features [r s+n d]`, `is_hidden [r n]` -> conditions of all tokens, `[r n d]`."""
        model = self.model
        is_mask = F.pad(is_hidden, (model.num_buffer_tokens, 0), value=False)[..., None]
        hidden_states = torch.where(is_mask, model.mask_token, model.between(features))
        hidden_states = model.decoder(hidden_states + model.decoder.position_embed)
        return hidden_states[:, model.num_buffer_tokens :] + model.condition_position


def _plain_denoiser(model: MAR, conditions: Tensor, scale: float) -> Predict:
    def predict(noisy: Tensor, time: float) -> Tensor:
        timesteps = torch.full(conditions.shape[:2], time, device=noisy.device)
        cond, uncond = model.denoiser(noisy.repeat(2, 1, 1), timesteps, conditions).chunk(2)
        channels = noisy.shape[-1]
        noise = apply_guidance(cond[..., :channels], uncond[..., :channels], scale)
        return torch.cat([noise, cond[..., channels:]], dim=-1)

    return predict
