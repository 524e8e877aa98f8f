from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.codec.container import CHECKSUM, Container, Prior, checksum_of, weights_hash
from vistok.codec.entropy import UniformPredictor, decode_indices, encode_indices

HASHES = st.binary(min_size=8, max_size=8).map(bytes.hex)


@st.composite
def containers(draw: st.DrawFn) -> Container:
    return Container(
        tokenizer=draw(HASHES),
        original_size=(draw(st.integers(1, 2**14)), draw(st.integers(1, 2**14))),
        num_tokens=draw(st.integers(1, 5000)),
        codebook_size=draw(st.integers(2, 2**24 - 1)),
        payload=draw(st.binary(max_size=100)),
        model=draw(st.text("az-9/ü", max_size=20)),
        prior=draw(st.none() | st.builds(Prior, HASHES, st.integers(0, 2**32 - 1))),
    )


@given(containers())
def test_everything_is_restored(container: Container) -> None:
    assert Container.from_bytes(container.to_bytes()) == container


def test_the_format_is_frozen() -> None:
    """The example of docs/codec.md; a change of these bytes needs a new version."""
    indices = [3000, 7, 4095, 0, 1234]
    container = Container(
        tokenizer="0123456789abcdef",
        original_size=(640, 480),
        num_tokens=5,
        codebook_size=4096,
        payload=encode_indices(indices, UniformPredictor(4096)),
    )
    data = container.to_bytes()
    assert data.hex(" ") == EXAMPLE
    assert decode_indices(Container.from_bytes(data).payload, 5, UniformPredictor(4096)) == indices


EXAMPLE = "56 54 4b 01 00 01 23 45 67 89 ab cd ef 80 05 e0 03 05 80 20 00 bb 80 07 ff ee 44 6d 20 18 d9 52 3e"


def test_the_header_stays_small() -> None:
    """What docs/codec.md says: 25 bytes around the payload, 37 with a prior."""
    facts = {"tokenizer": "0" * 16, "original_size": (1920, 1080), "num_tokens": 64, "codebook_size": 4096}
    assert len(Container(**facts, payload=b"").to_bytes()) == 25
    assert len(Container(**facts, payload=b"", prior=Prior("0" * 16, 0)).to_bytes()) == 37


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"original_size": (0, 5)}, "0x5 pixels"),
        ({"original_size": (2**20, 2**20)}, "pixels"),
        ({"num_tokens": 0}, "at least one token"),
        ({"codebook_size": 1}, "codebooks of 2 to"),
        ({"codebook_size": 2**24}, "codebooks of 2 to"),
    ],
)
def test_values_that_no_file_can_have(changes: dict, words: str) -> None:
    facts = {"tokenizer": "0" * 16, "original_size": (4, 4), "num_tokens": 1, "codebook_size": 2}
    with pytest.raises(ValueError, match=words):
        Container(**facts | changes, payload=b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a file that `vistok compress` wrote"),
        (b"\x89PNG\r\n\x1a\n", "not a file that `vistok compress` wrote"),
        (b"VTK", "damaged or truncated"),
        (b"VTK\x01", "damaged or truncated"),
        (b"VTK\x02 and more of it, as a later version writes it", "format 2 is not known here, only 1"),
    ],
)
def test_files_of_other_kinds(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Container.from_bytes(data)


@given(st.binary(max_size=120))
def test_forged_headers_with_a_right_checksum(body: bytes) -> None:
    data = b"VTK\x01" + body
    data += CHECKSUM.pack(zlib.crc32(data))
    try:
        container = Container.from_bytes(data)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert container.num_tokens >= 1


def test_parts_of_checksums() -> None:
    assert weights_hash("ConvTiTok-0123456789abcdef") == "0123456789abcdef"
    assert checksum_of([1, 2]) == zlib.crc32(bytes([1, 0, 0, 0, 2, 0, 0, 0]))
