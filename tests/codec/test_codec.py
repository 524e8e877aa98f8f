"""Files of whole pictures: round trips, and what becomes of files that somebody or something changed."""

from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.codec.conftest import make_generator
from tests.tiny import TOKENIZER
from vistok.codec.codec import ImageCodec, resize_to_original
from vistok.codec.container import CHECKSUM, Container
from vistok.data.images import resize_and_crop, to_pil, to_tensor
from vistok.models.generators.maskgit import MaskGITBert
from vistok.models.generators.text_ar import TextAR
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.order import BlockOrder
from vistok.tokens import Layout, Tokens

CODECS = ["uniform_codec", "prior_codec"]
INDICES = [3, 14, 15, 9, 2, 6]


def make_tokens(indices: list[int]) -> Tokens:
    return Tokens(indices=torch.tensor([indices]), codebook_size=20)


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> ImageCodec:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def files(uniform_codec: ImageCodec, prior_codec: ImageCodec) -> list[tuple[ImageCodec, bytes, list[int]]]:
    """Files of both kinds with the codecs and tokens that they are of."""
    return [
        (codec, codec.pack(make_tokens(indices), (31, 17)), indices)
        for codec in (uniform_codec, prior_codec)
        for indices in (INDICES, INDICES[:1], [0] * 6)
    ]


@pytest.mark.parametrize("length", range(1, 7))
def test_all_lengths_come_back(codec: ImageCodec, length: int) -> None:
    container = Container.from_bytes(codec.pack(make_tokens(INDICES[:length]), (31, 17)))
    tokens = codec.unpack(container)
    assert tokens.data.tolist() == [INDICES[:length]] and tokens.codebook_size == 20
    assert container.original_size == (31, 17)


def test_a_picture_comes_back_as_the_tokenizer_decodes_it(codec: ImageCodec) -> None:
    picture = Image.radial_gradient("L").resize((40, 24)).convert("RGB")
    data = codec.compress(picture, num_tokens=4)
    assert data == codec.compress(picture, num_tokens=4)
    image = to_tensor(resize_and_crop(picture, 16))[None]
    tokenizer = codec.tokenizer
    expected = to_pil(tokenizer.decode(tokenizer.encode(image, 4)))[0]
    assert np.array_equal(np.asarray(codec.decompress(data)), np.asarray(expected))
    assert Container.from_bytes(data).original_size == (40, 24)


def test_a_target_chooses_the_length(uniform_codec: ImageCodec) -> None:
    picture = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    lengths = [
        Container.from_bytes(uniform_codec.compress(picture, target_psnr=psnr)).num_tokens
        for psnr in (0.0, 90.0)
    ]
    assert lengths == [1, 6]


def test_padding_is_left_out(uniform_codec: ImageCodec) -> None:
    padded = Tokens(indices=torch.tensor([[5, 6, 7]]), lengths=torch.tensor([2]), codebook_size=20)
    assert uniform_codec.pack(padded, (4, 4)) == uniform_codec.pack(make_tokens([5, 6]), (4, 4))


def test_the_original_scale_keeps_the_square() -> None:
    assert resize_to_original(Image.new("RGB", (16, 16)), (40, 24)).size == (24, 24)


def mutate(data: bytes, draw: st.DrawFn) -> bytes:
    """One change of one of the kinds that files suffer."""
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    kind = draw(st.sampled_from(["flip", "burst", "cut", "insert", "delete", "overwrite", "repeat"]))
    if kind == "flip" and data:
        return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "delete":
        return data[:place] + data[place + draw(st.integers(1, 20)) :]
    if kind == "repeat":
        return data[:place] + data
    some = draw(st.binary(min_size=1, max_size=4 if kind == "burst" else 20))
    return data[:place] + some + data[place + (0 if kind == "insert" else len(some)) :]


@st.composite
def mutations(draw: st.DrawFn, data: bytes, max_changes: int = 3) -> bytes:
    for _ in range(draw(st.integers(1, max_changes))):
        data = mutate(data, draw)
    return data


@settings(max_examples=120)
@given(st.data())
def test_a_changed_file_is_refused_or_gives_the_same_tokens(files, data: st.DataObject) -> None:
    codec, original, indices = data.draw(st.sampled_from(files))
    changed = data.draw(mutations(original))
    assert_refused_or_same(codec, changed, indices)


def test_many_files_with_random_errors_are_refused(files) -> None:
    """Far more than hypothesis can try: one to four bytes anywhere become others."""
    random = np.random.default_rng(0)
    codec, original, _ = files[0]
    for _ in range(5000):
        data = np.frombuffer(original, np.uint8).copy()
        places = random.choice(len(data), random.integers(1, 5), replace=False)
        data[places] ^= random.integers(1, 256, len(places), dtype=np.uint8)
        with pytest.raises(ValueError):
            codec.decompress(data.tobytes())


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(uniform_codec: ImageCodec, data: bytes) -> None:
    with pytest.raises(ValueError):
        uniform_codec.decompress(data)


def test_every_flipped_bit_and_every_cut_is_found(files) -> None:
    for codec, data, _ in files:
        number = int.from_bytes(data)
        changed = [(number ^ 1 << bit).to_bytes(len(data)) for bit in range(8 * len(data))]
        changed += [data[:size] for size in range(len(data))] + [data + b"\0", data + data]
        for file in changed:
            with pytest.raises(ValueError):
                codec.decompress(file)


@settings(max_examples=100)
@given(st.data())
def test_a_forged_file_gives_valid_tokens_or_an_error(files, data: st.DataObject) -> None:
    """The checksum is made right again after the change: nothing but ValueError may come of it."""
    codec, original, _ = data.draw(st.sampled_from(files))
    body = original[:4] + data.draw(mutations(original[4 : -CHECKSUM.size]))
    try:
        tokens = codec.unpack(Container.from_bytes(body + CHECKSUM.pack(zlib.crc32(body))))
    except ValueError:
        return
    codec.tokenizer.check_tokens(tokens)


def assert_refused_or_same(codec: ImageCodec, data: bytes, indices: list[int]) -> None:
    try:
        tokens = codec.unpack(Container.from_bytes(data))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert tokens.data.tolist() == [indices]


def test_files_of_other_weights(codec: ImageCodec, generator, tokenizer) -> None:
    torch.manual_seed(7)
    other = ImageCodec(ConvTiTok(**TOKENIZER).eval(), generator)
    data = other.pack(make_tokens(INDICES), (4, 4))
    hash_of_other = other.tokenizer.identity()[-16:]
    with pytest.raises(ValueError, match=f"made with the tokenizer ...-{hash_of_other}, and not with ConvTi"):
        codec.decompress(data)


def test_files_of_another_generator(uniform_codec, prior_codec, tokenizer) -> None:
    data = ImageCodec(tokenizer, make_generator(seed=7)).pack(make_tokens(INDICES), (4, 4))
    with pytest.raises(ValueError, match="generator ...-.* and not of TextAR-"):
        prior_codec.decompress(data)
    with pytest.raises(ValueError, match="decompress it with the pipeline that made it"):
        uniform_codec.decompress(data)


def test_a_generator_is_not_needed_for_files_without_a_prior(uniform_codec, prior_codec) -> None:
    data = uniform_codec.pack(make_tokens(INDICES), (4, 4))
    assert prior_codec.unpack(Container.from_bytes(data)).data.tolist() == [INDICES]


def test_a_generator_that_predicts_otherwise_is_found_by_the_tokens(tokenizer, generator) -> None:
    """Rounded weights have the same identity, as another machine's arithmetic would, and give other tokens."""
    rounded = copy.deepcopy(generator).to(torch.bfloat16).float()
    data = ImageCodec(tokenizer, generator).pack(make_tokens(INDICES), (4, 4))
    codec = ImageCodec(tokenizer, rounded)
    with pytest.raises(ValueError, match="does not predict here as it did|coded with other probabilities"):
        codec.decompress(data)


def test_what_a_codec_cannot_be_made_of(tokenizer, monkeypatch) -> None:
    with pytest.raises(ValueError, match="does not fit ConvTiTok: its codebook_size is 30 and not 20"):
        ImageCodec(tokenizer, make_generator(codebook_size=30))
    with pytest.raises(ValueError, match="its num_tokens is 4 and not 6"):
        ImageCodec(tokenizer, make_generator(num_tokens=4))
    grid = make_generator()
    grid.layout = Layout((2, 3))
    with pytest.raises(
        ValueError, match="it makes tokens on a grid of 2x3, the tokenizer decodes them in a sequence"
    ):
        ImageCodec(tokenizer, grid)
    masked = MaskGITBert(
        codebook_size=20, num_classes=2, num_tokens=6, dim=8, depth=1, num_heads=1, mlp_dim=8
    )
    with pytest.raises(ValueError, match="MaskGITBert does not predict the next token"):
        ImageCodec(tokenizer, masked)
    monkeypatch.setattr(TextAR, "order", BlockOrder(6, 2))
    with pytest.raises(ValueError, match="TextAR does not predict the next token"):
        ImageCodec(tokenizer, make_generator())
    monkeypatch.setattr(tokenizer, "codebook_size", None)
    with pytest.raises(ValueError, match="has continuous tokens"):
        ImageCodec(tokenizer)
    monkeypatch.setattr(tokenizer, "codebook_size", 2**24)
    with pytest.raises(ValueError, match="codebooks of 2 to"):
        ImageCodec(tokenizer)


def test_what_cannot_be_packed(uniform_codec: ImageCodec) -> None:
    two = Tokens(indices=torch.zeros(2, 6, dtype=torch.int64), codebook_size=20)
    with pytest.raises(ValueError, match="one image, got 2"):
        uniform_codec.pack(two, (4, 4))
    with pytest.raises(ValueError, match="codebook of 30"):
        uniform_codec.pack(Tokens(indices=torch.zeros(1, 6, dtype=torch.int64), codebook_size=30), (4, 4))
