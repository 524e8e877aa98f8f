import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.tiny import GENERATOR, TOKENIZER


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    tokenizer, generator = vistok.ConvTiTok(**TOKENIZER).eval(), vistok.TextAR(**GENERATOR).eval()
    made = vistok.TextToImagePipeline(tokenizer, generator, guidance_scale=2.0, top_p=0.9)
    made.set_progress_bar_config(disable=True)
    return made


def test_output_types(pipeline):
    pictures = pipeline(["a", "b"], num_images_per_prompt=2).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 4
    array = pipeline("a", output_type="np").images
    assert array.shape == (1, 16, 16, 3) and array.min() >= 0 and array.max() <= 1
    tensor = pipeline("a", output_type="pt").images
    np.testing.assert_allclose((tensor[0].permute(1, 2, 0) + 1) / 2, array[0], atol=1e-6)
    tokens = pipeline("a", output_type="tokens", return_dict=False)[0]
    assert isinstance(tokens, vistok.Tokens) and tokens.data.shape == (1, 6)
    assert isinstance(pictures[0], Image.Image)


def test_image_j_of_every_prompt_uses_seed_plus_j(pipeline):
    batch = pipeline(["a", "b"], num_images_per_prompt=2, seed=5, output_type="tokens").images.data
    assert torch.equal(pipeline("b", seed=6, output_type="tokens").images.data[0], batch[3])
    assert torch.equal(pipeline(["a", "b"], seed=[5, 6], output_type="tokens").images.data[1], batch[3])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert torch.equal(
        pipeline(["a", "b"], generator=generators, output_type="tokens").images.data[1], batch[3]
    )
    assert not torch.equal(batch[0], batch[1])


def test_saved_pipeline_loads_in_a_fresh_process_and_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    script = (
        "import sys, vistok; p = vistok.load(sys.argv[1]); p.set_progress_bar_config(disable=True);"
        "print(p('a', seed=3, output_type='tokens').images.data.tolist(), p.sampling_settings()['top_p'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    expected = pipeline("a", seed=3, output_type="tokens").images.data.tolist()
    assert result.stdout.strip() == f"{expected} 0.9"
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["vistok", "TextAR"]


def test_callback_sees_every_step(pipeline):
    seen = []
    pipeline("a", callback_on_step_end=lambda _, step, total, state: seen.append((step, total)) or state)
    assert seen == [(step, 6) for step in range(6)]


def test_parts_that_do_not_fit_are_refused():
    tokenizer = vistok.ConvTiTok(**TOKENIZER)
    with pytest.raises(ValueError, match="its codebook_size is 21 and not 20"):
        vistok.TextToImagePipeline(tokenizer, vistok.TextAR(**{**GENERATOR, "codebook_size": 21}))
    with pytest.raises(ValueError, match="its num_tokens is 5 and not 6"):
        vistok.TextToImagePipeline(tokenizer, vistok.TextAR(**{**GENERATOR, "num_tokens": 5}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "a", "temperature": 0.0}, "temperature must be above 0"),
        ({"prompt": "a", "top_p": 0.0}, "top_p must be in"),
        ({"prompt": "a", "output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 images"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1"),
    ],
)
def test_bad_calls_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_a_pipeline_of_foreign_classes_is_not_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["os", "system"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="library 'os'"):
        vistok.load(tmp_path)
