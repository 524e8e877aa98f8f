from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vistok.data.token_file import TokenFile, load_tokens, save_tokens
from vistok.tokens import Layout, Tokens

DISCRETE = Tokens(
    indices=torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]),
    lengths=torch.tensor([3, 2]),
    codebook_size=6,
    layout=Layout((2, 2)),
)
CONTINUOUS = Tokens(latents=torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)))


def content(tokens: Tokens) -> TokenFile:
    return TokenFile(tokens, ["a.png", "größe/b.png"], tokenizer="ConvTiTok-0123", model="emoji-64")


@pytest.mark.parametrize("tokens", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_what_is_saved_is_loaded(tmp_path: Path, tokens: Tokens) -> None:
    save_tokens(tmp_path / "t.safetensors", content(tokens))
    loaded = load_tokens(tmp_path / "t.safetensors")
    assert torch.equal(loaded.tokens.data, tokens.data) and loaded.tokens.data.dtype == tokens.data.dtype
    assert torch.equal(loaded.tokens.token_counts, tokens.token_counts)
    assert (loaded.tokens.codebook_size, loaded.tokens.layout) == (tokens.codebook_size, tokens.layout)
    assert loaded.sources == ["a.png", "größe/b.png"]
    assert (loaded.tokenizer, loaded.model) == ("ConvTiTok-0123", "emoji-64")


def test_every_image_has_a_source() -> None:
    with pytest.raises(ValueError, match="2 images, but 1 source names"):
        TokenFile(DISCRETE, ["a.png"], "x", "y")


def test_tokens_know_their_maker() -> None:
    content(DISCRETE).check_maker("ConvTiTok-0123")
    with pytest.raises(
        ValueError, match="of ConvTiTok-0123, which was loaded as 'emoji-64', and not of TiTok-9"
    ):
        content(DISCRETE).check_maker("TiTok-9")


def rewrite(path: Path, change) -> None:
    from safetensors import safe_open

    save_tokens(path, content(DISCRETE))
    with safe_open(path, "pt") as file:
        metadata, data = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(data, metadata)
    save_file(data, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, metadata: data["indices"].fill_(6), "token id 6 is out of range.* 0 to 5"),
        (lambda data, metadata: data["indices"].fill_(-1), "token id -1 is out of range"),
        (lambda data, metadata: data["lengths"].fill_(5), "lengths must lie in 1..4"),
        (lambda data, metadata: data.pop("indices"), "either indices"),
        (lambda data, metadata: data.pop("lengths"), "not a token file of vistok"),
        (lambda data, metadata: metadata.pop("tokenizer"), "tokenizer"),
        (lambda data, metadata: metadata.update(format="vistok-tokens-0"), "not a token file of vistok"),
        (lambda data, metadata: metadata.update(layout="2xtwo"), "two"),
        (lambda data, metadata: metadata.update(sources="[]"), "2 images, but 0 source names"),
    ],
)
def test_faulty_files_are_refused_by_name(tmp_path: Path, change, message: str) -> None:
    rewrite(tmp_path / "t.safetensors", change)
    with pytest.raises(ValueError, match=rf"t\.safetensors.*{message}"):
        load_tokens(tmp_path / "t.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        load_tokens(tmp_path / "nowhere.safetensors")
    save_tokens(tmp_path / "t.safetensors", content(DISCRETE))
    whole = (tmp_path / "t.safetensors").read_bytes()
    for damaged in (whole[:-8], whole[:20], b"", b"<html>"):
        (tmp_path / "t.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a token file, or is truncated"):
            load_tokens(tmp_path / "t.safetensors")


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_tokens(tmp_path / "nowhere" / "t.safetensors", content(DISCRETE))
    assert not list(tmp_path.iterdir())
