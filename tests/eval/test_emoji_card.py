import json

import vistok
from vistok.eval.emoji_card import write_card

REPORT = {
    "reconstruction": {"psnr": 20.123, "ssim": 0.8, "codebook_usage": 0.5},
    "reconstruction_all": {"psnr": 21.0, "ssim": 0.8, "codebook_usage": 0.9},
    "generated": {"every": {"share": 0.625}, "heldout": {"share": 0.25}},
    "chance": 0.03,
    "lengths": [
        {"num_tokens": 1, "psnr": 11.04, "recognised": {"share": 0.1, "num_images": 10}},
        {"num_tokens": 6, "psnr": 20.12, "recognised": {"share": 0.8, "num_images": 10}},
    ],
}


def test_card_and_facts_repeat_the_report(tmp_path):
    tokenizer = vistok.ConvTiTok(
        image_size=16,
        num_tokens=6,
        levels=(5, 4),
        dim=16,
        num_heads=2,
        encoder_depth=1,
        decoder_depth=1,
        conv_dim=8,
    )
    generator = vistok.TextAR(codebook_size=20, num_tokens=6, dim=16, depth=1, num_heads=2, mlp_dim=16)
    vistok.TextToImagePipeline(tokenizer, generator).save_pretrained(tmp_path / "tiny")
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    for picture in ("prefixes.png", "lengths.png"):
        (tmp_path / picture).write_bytes(picture.encode())
    write_card(tmp_path, tmp_path / "tiny")
    facts = json.loads((tmp_path / "tiny" / "facts.json").read_text())
    assert facts["metrics"]["held-out PSNR, dB"] == 20.12
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "| recognised of 200 names x 2 seeds, % | 62.5 |" in card
    assert "# tiny" in card and "6\ntokens of 5 bits" in card
    assert (
        "| Tokens | 1 | 6 |\n|---|---|---|\n| PSNR | 11.0 dB | 20.1 dB |\n| Recognised | 10.0 % | 80.0 % |"
        in card
    )
    assert (tmp_path / "tiny" / "prefixes.png").read_bytes() == b"prefixes.png"
