"""Files of tokens: one safetensors file with the tokens, where they came from and which tokenizer made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vistok.files import atomic_path
from vistok.tokens import Layout, Tokens

FORMAT = "vistok-tokens-1"


@dataclass(frozen=True)
class TokenFile:
    """Contents of a file of tokens."""

    tokens: Tokens
    sources: list[str]  # name of the image behind each row
    tokenizer: str  # `ImageTokenizer.identity()` of the maker
    model: str  # the name or path the maker was loaded by

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} images, but {len(self.sources)} source names")

    def check_maker(self, identity: str) -> None:
        """Raises ValueError unless the tokenizer of that `ImageTokenizer.identity()` made these tokens."""
        if identity != self.tokenizer:
            raise ValueError(
                f"these tokens are of {self.tokenizer}, which was loaded as {self.model!r}, and not of {identity}; "
                "decode them with the tokenizer that made them"
            )


def save_tokens(path: Path | str, content: TokenFile) -> None:
    """Write a file of tokens, atomically.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    tokens = content.tokens
    metadata = {
        "format": FORMAT,
        "tokenizer": content.tokenizer,
        "model": content.model,
        "sources": json.dumps(content.sources),
        "layout": str(tokens.layout),
        "codebook_size": json.dumps(tokens.codebook_size),
    }
    data = {"indices" if tokens.is_discrete else "latents": tokens.data, "lengths": tokens.token_counts}
    with atomic_path(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in data.items()}, partial, metadata)


def load_tokens(path: Path | str) -> TokenFile:
    """Read a file of tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tokens, truncated, or with ids out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"token file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a token file, or is truncated: {error}") from None
    if metadata.get("format") != FORMAT or "lengths" not in data:
        raise ValueError(
            f"{path} is not a token file of vistok (format {FORMAT}); `vistok tokenize` writes them"
        )
    try:
        tokens = Tokens(
            indices=data.get("indices"),
            latents=data.get("latents"),
            lengths=data["lengths"],
            codebook_size=json.loads(metadata["codebook_size"]),
            layout=Layout.parse(metadata["layout"]),
        )
        return TokenFile(tokens, json.loads(metadata["sources"]), metadata["tokenizer"], metadata["model"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
