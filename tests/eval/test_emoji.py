"""The emoji report with stand-ins: what it counts, what it samples with, what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import vistok
from vistok.data.emoji import read_index
from vistok.eval import emoji as report_command
from vistok.eval.emoji import main, markdown
from vistok.eval.emoji_lengths import length_curve, length_strip
from vistok.eval.emoji_measures import evaluate_emoji
from vistok.eval.emoji_set import RealSet, draw_names, first_by_name
from vistok.eval.neighbours import chance_level, nearest, share_of
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.tokens import Tokens, growing_prefixes


def measure(pipeline, folder, extractor, **options):
    return evaluate_emoji(pipeline, folder, model="fake", extractor=extractor, num_names=15, **options)


def test_a_perfect_model_is_recognised(pipeline, emoji_folder, extractor):
    report = measure(pipeline, emoji_folder, extractor)
    assert (report.generated.every.share, report.generated.every.num_images) == (1.0, 30)
    assert (report.generated.train.num_images, report.generated.heldout.num_images) == (24, 6)
    assert report.reconstructed.every.num_images == 15
    assert report.chance == pytest.approx(1 / 3)
    assert (report.num_real, report.num_subcategories) == (18, 3)
    assert (report.fid.num_real, report.fid.num_fake) == (15, 30)  # one per name, without the variants
    assert report.reconstruction.num_images == 3


def test_a_model_that_fails_on_held_out_names(pipeline, emoji_folder, extractor, emoji_colours):
    for name in emoji_colours:
        if name.endswith("4"):
            pipeline.colours[name] = (20, 250, 20) if name.startswith("fruit") else (250, 20, 20)
    report = measure(pipeline, emoji_folder, extractor)
    assert (report.generated.train.share, report.generated.heldout.share) == (1.0, 0.0)
    assert report.generated.every.share == pytest.approx(24 / 30)


def test_every_image_has_its_own_seed_and_the_settings_are_recorded(pipeline, emoji_folder, extractor):
    report = measure(pipeline, emoji_folder, extractor, seeds_per_name=4, sampling={"temperature": 0.5})
    seeds = [seed for call in pipeline.calls for seed in call["seed"]]
    prompts = [prompt for call in pipeline.calls for prompt in call["prompt"]]
    assert seeds == list(range(60)) and prompts[:15] == prompts[45:]
    assert all(call["temperature"] == 0.5 and "guidance_scale" not in call for call in pipeline.calls)
    assert report.sampling == {"guidance_scale": 3.0, "temperature": 0.5}


class TwoColourTokenizer(ImageTokenizer):
    """Four tokens: the mean colour in red, green and blue, then nothing. Any prefix can be decoded."""

    image_size, num_tokens, codebook_size, variable_length = 32, 4, 256, True

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # diffusers asks a parameter for the device

    def encode_all(self, images):
        means = ((images.mean(dim=(2, 3)) + 1) * 127.5).round().long()
        return Tokens(indices=torch.nn.functional.pad(means, (0, 1)), codebook_size=256)

    def decode(self, tokens):
        kept = torch.arange(tokens.data.shape[1]) < tokens.token_counts[:, None]
        colours = torch.nn.functional.pad(tokens.data * kept, (0, 4))[:, :3].float() / 127.5 - 1
        return colours[:, :, None, None].expand(-1, -1, 32, 32)


def test_more_tokens_show_more(emoji_folder, extractor):
    reals = RealSet.read(emoji_folder, 32, extractor)
    names = draw_names(list(reals.by_name), 15, 0)
    points = length_curve(TwoColourTokenizer(), reals, names, extractor)
    assert [point.num_tokens for point in points] == [1, 2, 4]
    assert points[0].psnr < points[1].psnr < points[2].psnr
    assert points[0].recognised.share < 1 and points[2].recognised.share == 1


def test_powers_of_two_end_with_all_tokens():
    assert growing_prefixes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert growing_prefixes(6) == [1, 2, 4, 6]
    assert growing_prefixes(1) == [1]


def test_the_strip_of_prefixes_has_a_row_per_emoji_and_the_original_last(emoji_folder):
    strip = length_strip(TwoColourTokenizer(), emoji_folder, read_index(emoji_folder), rows=2)
    assert strip.width == 4 * (128 + 16) + 16  # 1, 2, 4 tokens and the original
    with_all, original = (strip.getpixel((16 + column * 144 + 64, 80)) for column in (2, 3))
    assert with_all == original


def test_names_are_drawn_by_seed_alone():
    names = [f"name {number}" for number in range(50)]
    assert draw_names(names, 10, 0) == draw_names(names[::-1], 10, 0) != draw_names(names, 10, 1)
    assert len(set(draw_names(names, 50, 0))) == 50
    with pytest.raises(ValueError, match="50 names, fewer than the 51"):
        draw_names(names, 51, 0)


@pytest.mark.parametrize("step", [1, -1])
def test_the_entry_without_skin_tone_stands_for_a_name(emoji_folder, step):
    emoji = read_index(emoji_folder)[::step]
    chosen = first_by_name(emoji)
    assert len(chosen) == 15
    assert all(emoji[index].name == name and not emoji[index].skin_tone for name, index in chosen.items())


def test_neighbours_are_by_angle():
    bank = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert nearest(torch.tensor([[1.0, 0.2], [5.0, 9.0]]), bank).tolist() == [0, 1]


def test_shares_and_chance():
    assert share_of([True, False, False, True]).share == 0.5
    assert share_of([]).share is None and str(share_of([])) == "–"
    assert chance_level(["a", "b"], ["a", "a", "a", "b"]) == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_markdown_states_value_and_protocol(pipeline, emoji_folder, extractor):
    text = markdown(measure(pipeline, emoji_folder, extractor))
    assert "| Recognised, held-out names | 100.0 % of 6 |" in text
    assert "| Chance | 33.3 % |" in text
    for part in (
        "15 names drawn with seed 0, 2 images each",
        "guidance_scale 3.0",
        "Machine: ",
        "mean-colour",
    ):
        assert part in text


def test_command_writes_report_and_pictures(pipeline, emoji_folder, extractor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vistok, "load", lambda name: pipeline, raising=False)
    monkeypatch.setattr(report_command, "load_extractor", lambda name, device: extractor)
    out = tmp_path / "tables" / "fake"
    main(
        [
            "--data",
            str(emoji_folder),
            "--model",
            "fake",
            "--out",
            str(out),
            "--num-names",
            "6",
            "--top-k",
            "9",
        ]
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "lengths.png",
        "prefixes.png",
        "reconstructions.png",
        "report.json",
        "report.md",
        "samples.png",
    ]
    written = json.loads((out / "report.json").read_text())
    assert written["sampling"]["top_k"] == 9 and written["num_names"] == 6
    assert json.loads(capsys.readouterr().out) == written
    assert Image.open(out / "samples.png").width == 6 * (128 + 16) + 16


def test_command_without_data_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and "python -m vistok.data.emoji" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
