"""Speculative decoding through the pipelines."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.pipelines.families import encode, make_pipeline
from vistok.decoding.speculative.drafters import IndependentDrafter, JacobiDrafter, NeighbourDrafter
from vistok.decoding.speculative.lantern import LanternRule
from vistok.decoding.speculative.strict import StrictRule
from vistok.hub import load_drafter
from vistok.pipelines.speculation import SpeculativeDecoding, make_rule

NEXT_TOKEN = ("text-ar", "flex-ar-class", "flex-ar-text", "llamagen-class", "llamagen-text")


def call(pipeline, **options):
    """Tokens `[2 n]` of two images."""
    if isinstance(pipeline, vistok.ClassToImagePipeline):
        conditions = {"class_labels": [1, 3]}
    elif hasattr(pipeline.transformer, "encode_text"):
        conditions = {"prompt": ["cat", "dog"]}
    else:
        conditions = {"prompt_features": encode(["cat", "dog"]), "null_features": encode([""])}
    result = pipeline(**conditions, output_type="tokens", **options)
    return result.images.data, result.statistics


@pytest.mark.parametrize("family", NEXT_TOKEN)
def test_every_next_token_family_decodes_greedily_as_without(family):
    pipeline = make_pipeline(family)
    options = {"guidance_scale": 2.0, "top_k": 1}
    plain, nothing = call(pipeline, **options)
    drafted, statistics = call(pipeline, **options, speculation=SpeculativeDecoding(JacobiDrafter(4)))
    assert nothing is None and torch.equal(plain, drafted)
    assert 1 <= statistics.target_passes < pipeline.transformer.num_tokens


def test_an_image_depends_on_its_seed_alone():
    pipeline = make_pipeline("llamagen-class")
    decoding = SpeculativeDecoding(NeighbourDrafter())
    options = {"speculation": decoding, "guidance_scale": 2.0, "output_type": "tokens"}
    both = pipeline([1, 3], seed=[7, 8], **options).images.data
    alone = pipeline([3], seed=8, **options).images.data
    assert torch.equal(both[1:], alone)


def test_the_progress_ends_at_the_last_token(capsys):
    pipeline = make_pipeline("text-ar")
    steps = []
    pipeline.set_progress_bar_config(disable=True)
    call(
        pipeline,
        speculation=SpeculativeDecoding(JacobiDrafter(4)),
        callback_on_step_end=lambda pipe, step, total, values: steps.append((step, total)),
    )
    assert steps == sorted(set(steps)) and steps[0][0] == 0 and steps[-1] == (15, 16)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("nar-class", {}, "NARClass does not decide one token after the other"),
        ("maskgit-bert", {}, "MaskGITBert does not decide one token after the other"),
        ("llamagen-class", {"logits_processor": lambda logits: logits}, "logits_processor or watermark"),
        ("llamagen-class", {"null_class": 2, "guidance_scale": 2.0}, "use negative_class, or decode plainly"),
        ("text-ar", {"preview_callback": print}, "does not support previews"),
    ],
)
def test_what_only_plain_decoding_does_is_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        call(make_pipeline(family), speculation=SpeculativeDecoding(JacobiDrafter()), **options)


def test_drafters_have_names(tmp_path):
    target = make_pipeline("llamagen-class").transformer
    assert isinstance(load_drafter("neighbours", target), NeighbourDrafter)
    target.save_pretrained(tmp_path / "small")
    assert isinstance(load_drafter(tmp_path / "small", target), IndependentDrafter)
    make_pipeline("nar-class").transformer.save_pretrained(tmp_path / "nar")
    with pytest.raises(ValueError, match="is a NARClass, which drafts nothing; name a trained drafter"):
        load_drafter(tmp_path / "nar", target)
    with pytest.raises(ValueError, match="unknown model 'jacoby'"):
        load_drafter("jacoby", target)


def test_rules_have_names(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    pipeline = make_pipeline("llamagen-class")
    assert isinstance(make_rule("strict", pipeline.tokenizer), StrictRule)
    rule = make_rule("lantern", pipeline.tokenizer, k=3, delta=0.2)
    assert isinstance(rule, LanternRule) and not rule.is_lossless
    tokens, _ = call(pipeline, speculation=SpeculativeDecoding(JacobiDrafter(), rule))
    assert tokens.shape == (2, 16)
    for arguments, message in [
        ({"accept": "loose"}, "unknown rule 'loose'; choose one of strict, lantern"),
        ({"accept": "strict", "k": 3}, "k and delta are of the rule 'lantern'"),
        ({"accept": "lantern", "k": 20}, r"k must be in 0\.\.19"),
        ({"accept": "lantern", "k": 3, "delta": -1.0}, "delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_rule(arguments.pop("accept"), pipeline.tokenizer, **arguments)
    with pytest.raises(ValueError, match="no codebook: its tokens are continuous"):
        make_rule("lantern", make_pipeline("xar-cells").tokenizer)


def test_lantern_is_itself_for_greedy_decoding(tmp_path, monkeypatch):
    """Of a target with one token left no neighbour has any mass: the rule must look before the filter."""
    monkeypatch.setenv("VISTOK_HOME", str(tmp_path))
    pipeline = make_pipeline("llamagen-class")
    rule = make_rule("lantern", pipeline.tokenizer, k=19, delta=1.0)
    drafter = IndependentDrafter(make_pipeline("llamagen-class").transformer)
    greedy, strict = (
        call(pipeline, top_k=1, guidance_scale=2.0, speculation=SpeculativeDecoding(JacobiDrafter(4), one))[1]
        for one in (rule, StrictRule())
    )
    assert greedy.target_passes < strict.target_passes
    assert call(pipeline, top_k=1, speculation=SpeculativeDecoding(drafter, rule))[1].target_passes <= 4


def test_drafters_of_another_target_or_condition_are_refused():
    target = make_pipeline("llamagen-class")
    other = vistok.LlamaGenClass(**{**target.transformer.config, "num_classes": 7})
    with pytest.raises(ValueError, match="num_classes of the drafter is 7, that of the target 5"):
        call(target, speculation=SpeculativeDecoding(IndependentDrafter(other)))
