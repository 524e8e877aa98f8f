from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vistok
from tests.tiny import GENERATOR, save_tiny_pipeline
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.decoding.speculative.eagle import EagleTreeDrafter
from vistok.decoding.speculative.generate import generate_speculative
from vistok.decoding.speculative.tree import TreeShape
from vistok.decoding.streams import ImageStreams
from vistok.kernels.attention import CausalMask, TreeMask
from vistok.models.drafters.eagle import EagleDrafter
from vistok.pipelines.settings import OrderedSettings
from vistok.training import target_data
from vistok.training.augment import Augmentation
from vistok.training.drafter import DrafterOptions, DrafterTask
from vistok.training.drafter_loss import align, unrolled
from vistok.training.recipe import Optimization, Recipe
from vistok.training.run import run
from vistok.training.target_data import Making, load_or_make, make_conditions

EMOJI = Path(__file__).parent.parent / "data" / "emoji"
CLASSES = {
    "codebook_size": 20,
    "num_tokens": 16,
    "num_classes": 3,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
}
DRAFTER = {
    "codebook_size": 20,
    "num_tokens": 16,
    "prefix_length": 0,
    "dim": 16,
    "num_heads": 2,
    "mlp_dim": 24,
    "own_tokens": False,
}
OPTIONS = {"num_images": 20, "images_per_shard": 8, "heldout_images": 4, "law_size": 20}


def sharpened(model):
    """Random weights whose distributions are neither flat nor certain."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """The folder of a class-conditional generator."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("target") / "generator"
    sharpened(vistok.LlamaGenClass(**CLASSES)).save_pretrained(folder)
    return str(folder)


def recipe_of(target: str, model: dict | None = None, **task) -> Recipe:
    return Recipe(
        "drafter",
        DRAFTER | (model or {}),
        {"target": target, **OPTIONS, "guidance_scale": 2.0, **task},
        optimization=Optimization(num_steps=4, warmup_steps=1, batch_size=8, lr=3e-3),
        log_every=1,
        checkpoint_every=2,
    )


def task_of(target: str, folder: Path, model: dict | None = None, **changes) -> DrafterTask:
    torch.manual_seed(0)
    options = DrafterOptions(target, **{**OPTIONS, "guidance_scale": 2.0, **changes})
    network = EagleDrafter(**DRAFTER | (model or {}))
    return DrafterTask(network, options, Augmentation(), torch.device("cpu"), folder, seed=0)


def test_it_learns_and_then_drafts(target: str, tmp_path: Path) -> None:
    recipe = recipe_of(target, num_steps=2)
    options = dataclasses.replace(recipe.optimization, num_steps=60, ema_decay=0.9)
    task = task_of(target, tmp_path / "before")
    before = task.evaluate(task.model.eval())
    measured = run(dataclasses.replace(recipe, optimization=options, checkpoint_every=60), tmp_path)
    assert measured["heldout_acceptance_1"] > before["heldout_acceptance_1"] + 0.02
    assert measured["heldout_tokens_per_pass"] > before["heldout_tokens_per_pass"]
    network = vistok.load(tmp_path / "model")
    made = generate_speculative(
        task.target,
        torch.tensor([0, 1]),
        drafter=EagleTreeDrafter(network, TreeShape.chain(2)),
        streams=ImageStreams.from_seeds([0, 1]),
        guidance=ConstantGuidance(2.0),
    )
    assert made.tokens.data.shape == (2, 16)


@pytest.mark.parametrize(
    "losses",
    [
        {"law_weight": 0.0, "token_weight": 0.1, "supervise_first": False, "feature_noise": 0.2},
        {"feature_weight": 0.0, "guidance_scale": 1.0},
        {"token_weight": 0.5, "num_steps": 3, "step_decay": 0.5},
    ],
)
def test_every_loss_reaches_every_weight(losses: dict, target: str, tmp_path: Path) -> None:
    task = task_of(target, tmp_path, **losses)
    loss, logs = task.loss(task.batch(4, torch.Generator().manual_seed(0)))
    loss.backward()
    parts = ("feature", "token", "law")
    weights = [getattr(task.options, f"{part}_weight") for part in parts]
    assert list(logs) == [f"{part}_loss" for part, weight in zip(parts, weights, strict=True) if weight]
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in task.target.parameters())


@torch.inference_mode()
def test_features_and_laws_are_those_of_decoding(target: str) -> None:
    """Against the plain loop: one step after the other, in float32."""
    model = vistok.load(target)
    settings = OrderedSettings(guidance_scale=2.0, guidance_tokens=5, temperature=0.7, top_k=9)
    labels = torch.tensor([1, 2])
    made = Making(model, settings, prefix_length=0, law_size=6).images(labels, [0, 1])
    cache = model.new_cache(4)
    logits = model.prefill(torch.cat([labels, model.null_condition(2)]), cache)
    for place in range(16):
        cond, uncond = logits.chunk(2)
        scale = settings.guidance(model.order).at(place, 16)
        guided = uncond + scale * (cond - uncond)
        probs = token_probabilities(guided, settings.sampling)[:, 0]
        best = probs.topk(6).values
        torch.testing.assert_close(
            made.law_probs[:, place], best / best.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
        )
        at_tokens = probs.gather(1, made.law_tokens[:, place])
        torch.testing.assert_close(at_tokens, best, atol=1e-5, rtol=1e-4)
        from_features = model.features_to_logits(made.features[:, :, place].transpose(0, 1).flatten(0, 1))
        torch.testing.assert_close(from_features, logits[:, 0], atol=1e-4, rtol=1e-4)
        if place < 15:
            logits = model.step(made.indices[:, [place]].repeat(2, 1), cache)


def test_shards_are_made_once_and_a_lost_one_again(target: str, tmp_path: Path, monkeypatch) -> None:
    making = Making(vistok.load(target), OrderedSettings(), 0, 4)
    labels = torch.arange(20) % 3
    first = load_or_make(making, labels, tmp_path, 8)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"shard-{i:05}.safetensors" for i in range(3)]
    kept = load_file(files[1])
    files[1].unlink()
    calls: list[list[int]] = []
    images = Making.images
    monkeypatch.setattr(
        Making, "images", lambda self, rows, seeds: calls.append(seeds) or images(self, rows, seeds)
    )
    again = load_or_make(making, labels, tmp_path, 8)
    assert calls == [list(range(8, 16))]
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(files[1]).items())
    chosen = torch.tensor([19, 0, 8])
    assert torch.equal(again.rows(chosen).indices, first.rows(chosen).indices)
    assert torch.equal(again.rows(chosen).indices[1], load_file(files[0])["indices"][0])
    other = dataclasses.replace(making, settings=OrderedSettings(temperature=0.5))
    load_or_make(other, labels, tmp_path, 8)
    assert len(calls) == 1 + 3


def test_a_damaged_shard_is_made_again(target: str, tmp_path: Path) -> None:
    making = Making(vistok.load(target), OrderedSettings(), 0, 4)
    load_or_make(making, torch.arange(3), tmp_path, 8)
    shard = tmp_path / "shard-00000.safetensors"
    whole, expected = shard.read_bytes(), {name: tensor.clone() for name, tensor in load_file(shard).items()}
    shard.unlink()  # it is mapped into memory
    shard.write_bytes(whole[:-100])
    load_or_make(making, torch.arange(3), tmp_path, 8)
    assert all(torch.equal(expected[name], tensor) for name, tensor in load_file(shard).items())


@torch.inference_mode()
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_unrolling_is_drafting(prefix_length: int) -> None:
    """Step t at position j predicts what a chain does whose last true feature is that of position j - t."""
    torch.manual_seed(0)
    network = sharpened(
        EagleDrafter(**DRAFTER | {"prefix_length": prefix_length, "depth": 2, "own_tokens": True})
    )
    features, indices = torch.randn(2, prefix_length + 9, 16), torch.randint(20, (2, 16))
    pairs = align(features, indices, prefix_length)
    assert pairs.tokens.shape == (2, prefix_length + 8) and pairs.first == prefix_length
    embeds = network.embed_tokens(pairs.tokens)
    steps = list(unrolled(network, pairs, embeds, 3))
    for last in (prefix_length, prefix_length + 4):
        cache = network.new_cache(2)
        places = torch.arange(last + 1)
        drafted = network(pairs.features[:, : last + 1], embeds[:, : last + 1], places, CausalMask(), cache)
        torch.testing.assert_close(steps[0][:, last], drafted[:, -1], atol=1e-4, rtol=1e-4)
        cache.split_rows()
        for depth in (1, 2):
            place = last + depth
            mask = TreeMask(cache.lengths, torch.ones(2, 1, depth, dtype=torch.bool))
            position = torch.full((2, 1), place)
            drafted = network(drafted[:, -1:], embeds[:, place : place + 1], position, mask, cache)
            torch.testing.assert_close(steps[depth][:, place], drafted[:, 0], atol=1e-4, rtol=1e-4)


def test_the_first_token_is_supervised_unless_not_asked(target: str, tmp_path: Path) -> None:
    places = [
        task_of(target, tmp_path, supervise_first=first)._pairs(
            task_of(target, tmp_path).batch(1, torch.Generator().manual_seed(0))
        )
        for first in (True, False)
    ]
    assert [pairs.is_supervised().nonzero()[0].item() for pairs in places] == [0, 1]
    assert places[0].is_supervised(2).nonzero()[0].item() == 2


@torch.inference_mode()
def test_acceptance_is_measured_as_it_happens(target: str, tmp_path: Path) -> None:
    """For chains of one token, the overlap on held-out images is the share that the engine accepts of new ones."""
    task = task_of(target, tmp_path, num_images=200, images_per_shard=100, heldout_images=150)
    model = sharpened(task.model)
    expected = task.evaluate(model)["heldout_acceptance_1"]
    labels = torch.arange(150) % 3
    made = generate_speculative(
        task.target,
        labels,
        drafter=EagleTreeDrafter(model, TreeShape.chain(1)),
        streams=ImageStreams.from_seeds(range(1000, 1150)),
        sampling=SamplingParams(),
        guidance=ConstantGuidance(2.0),
    ).statistics
    drawn, passes = int(made.num_drawn.sum()), int(made.row_passes.sum())
    assert drawn / passes - 1 == pytest.approx(
        expected, abs=0.06
    )  # the last places of an image count a little less


def test_a_text_target_with_its_own_settings(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipeline", seed=0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\n\nred apple\n")
    sizes = {"num_tokens": GENERATOR["num_tokens"], "positions": "table", "prefix_length": 8}
    task = task_of(str(folder), tmp_path, sizes, prompts=str(prompts), guidance_scale=None, temperature=0.9)
    assert (task.settings.guidance_scale, task.settings.top_p, task.settings.temperature) == (2.0, 0.9, 0.9)
    batch = task.batch(3, torch.Generator().manual_seed(0))
    assert batch.features.shape == (
        3,
        2,
        8 + 6,
        16,
    )  # the text's 8 positions and the start, five of six tokens
    assert torch.isfinite(task.loss(batch)[0])


def test_prompts_of_the_emoji_set(tmp_path: Path) -> None:
    model = vistok.TextAR(**GENERATOR | {"text_length": 64})
    rows = make_conditions(model, EMOJI, 30, seed=0)
    assert rows.shape == (30, 64) and len(rows.unique(dim=0)) > 3
    assert torch.equal(rows, make_conditions(model, EMOJI, 30, seed=0))


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ({"codebook_size": 19}, {}, "codebook_size of the drafter is 19, that of LlamaGenClass 20"),
        ({"dim": 8}, {}, "dim of the drafter is 8, that of LlamaGenClass 16"),
        ({"num_tokens": 25}, {}, "num_tokens of the drafter is 25, that of LlamaGenClass 16"),
        ({"prefix_length": 1}, {}, "reads 1 condition positions in front of the last, LlamaGenClass has 0"),
        ({}, {"prompts": "x"}, "LlamaGenClass is conditioned on classes: leave out prompts"),
        ({}, {"heldout_images": 20}, "heldout_images must be in 1..19, of 20 images; got 20"),
        ({}, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({}, {"top_k": 99}, "top_k 99 is larger than the vocabulary of 20"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: dict, task: dict, message: str, target: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(recipe_of(target, model, **task), tmp_path)
    assert not (tmp_path / "model").exists()


def test_targets_without_prompts_or_order_are_refused(tmp_path: Path) -> None:
    text = vistok.TextAR(**GENERATOR)
    with pytest.raises(ValueError, match="needs prompts"):
        make_conditions(text, None, 2, seed=0)
    with pytest.raises(FileNotFoundError, match="name the emoji set's folder or a text file"):
        make_conditions(text, tmp_path / "none.txt", 2, seed=0)
    masked = vistok.MaskGITBert(**CLASSES | {"depth": 1})
    with pytest.raises(ValueError, match="MaskGITBert does not predict token after token"):
        Making(masked, OrderedSettings(), 0, 4)


def test_batches_are_made_of_training_images_only(target: str, tmp_path: Path, monkeypatch) -> None:
    task = task_of(target, tmp_path, num_images=10, images_per_shard=4, heldout_images=7)
    seen: set[int] = set()
    rows = target_data.TargetShards.rows
    monkeypatch.setattr(
        target_data.TargetShards,
        "rows",
        lambda self, chosen: seen.update(chosen.tolist()) or rows(self, chosen),
    )
    task.batch(64, torch.Generator().manual_seed(0))
    assert seen == {0, 1, 2}
    task.evaluate(task.model.eval())
    assert seen == set(range(10))
