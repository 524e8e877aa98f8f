"""The `.vtk` container: a short header, the entropy-coded tokens of one image, a checksum.

docs/codec.md describes every byte. A file says which tokenizer made it, by the hash of its configuration and weights,
and ends with a CRC-32 of all that comes before: it finds every burst of up to 32 wrong bits and, in files of this size,
any 3 wrong bits wherever they lie (Koopman 2002); other damage goes unseen once in 2^32 times.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

MAGIC = b"VTK"
VERSION = 1
UNIFORM, PRIOR = 0, 1  # the entropy model
MAX_CODEBOOK_SIZE = 2**24 - 1  # the range coder's probabilities are multiples of 2^-24
MAX_PIXELS = 2**28  # more than any picture has that Pillow opens
MAX_NUMBER = 2**35 - 1  # five groups of seven bits

START = struct.Struct("<3sBB8s")  # magic, version, entropy model, hash of the tokenizer
PRIOR_FIELDS = struct.Struct("<8sI")  # hash of the generator, checksum of the tokens
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Prior:
    """What a file says of the generator whose probabilities its tokens were coded with."""

    generator: str  # hash in its identity, 16 hexadecimal digits
    tokens_checksum: int  # `checksum_of` the tokens: whether the generator predicts here as it did there


@dataclass(frozen=True)
class Container:
    """Contents of a file.

    Args:
        tokenizer: hash in `ImageTokenizer.identity()` of the maker, 16 hexadecimal digits.
        original_size: width and height of the picture before it was cropped and resized.
        num_tokens: tokens in the payload, at least 1.
        codebook_size: codes they choose from.
        payload: the tokens, entropy-coded.
        model: a name that `vistok.load` resolves to the tokenizer; may be empty.
        prior: `None` if the entropy model is uniform.

    Raises:
        ValueError: a value that no file can have.
    """

    tokenizer: str
    original_size: tuple[int, int]
    num_tokens: int
    codebook_size: int
    payload: bytes
    model: str = ""
    prior: Prior | None = None

    def __post_init__(self) -> None:
        width, height = self.original_size
        if not (width >= 1 and height >= 1 and width * height <= MAX_PIXELS):
            raise ValueError(
                f"a picture of {width}x{height} pixels cannot be: 1 to {MAX_PIXELS} are possible"
            )
        if not 1 <= self.num_tokens <= MAX_NUMBER:
            raise ValueError(f"there must be at least one token, got {self.num_tokens}")
        check_codebook_size(self.codebook_size)

    def to_bytes(self) -> bytes:
        """The file."""
        model = self.model.encode()
        entropy_model = UNIFORM if self.prior is None else PRIOR
        parts = [START.pack(MAGIC, VERSION, entropy_model, bytes.fromhex(self.tokenizer))]
        parts += map(_number, (*self.original_size, self.num_tokens, self.codebook_size, len(model)))
        parts.append(model)
        if self.prior is not None:
            parts.append(PRIOR_FIELDS.pack(bytes.fromhex(self.prior.generator), self.prior.tokens_checksum))
        body = b"".join([*parts, self.payload])
        return body + CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Container:
        """Inverse of `to_bytes`.

        Raises:
            ValueError: not such a file, of another version, damaged, truncated, or with impossible values.
        """
        if not data.startswith(MAGIC):
            raise ValueError("not a file that `vistok compress` wrote")
        if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
            raise ValueError(
                f"format {data[len(MAGIC)]} is not known here, only {VERSION}: a newer vistok wrote this, or it is damaged"
            )
        body, checksum = data[: -CHECKSUM.size], data[-CHECKSUM.size :]
        if len(data) < START.size + CHECKSUM.size or CHECKSUM.pack(zlib.crc32(body)) != checksum:
            raise ValueError("damaged or truncated: the checksum is wrong; copy or download the file again")
        try:
            return cls._parse(_Reader(body))
        except (IndexError, UnicodeDecodeError, struct.error):
            raise ValueError("the header is malformed: no vistok wrote this") from None

    @classmethod
    def _parse(cls, reader: _Reader) -> Container:
        _, _, entropy_model, tokenizer = reader.unpack(START)
        if entropy_model not in (UNIFORM, PRIOR):
            raise ValueError(f"entropy model {entropy_model} is not known here; a newer vistok wrote this")
        width, height, num_tokens, codebook_size = (reader.number() for _ in range(4))
        model = reader.bytes(reader.number()).decode()
        prior = None
        if entropy_model == PRIOR:
            generator, tokens_checksum = reader.unpack(PRIOR_FIELDS)
            prior = Prior(generator.hex(), tokens_checksum)
        payload = reader.bytes(reader.remaining)
        return cls(tokenizer.hex(), (width, height), num_tokens, codebook_size, payload, model, prior)


def check_codebook_size(codebook_size: int) -> None:
    """Raises ValueError for a codebook whose tokens cannot be coded."""
    if not 2 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise ValueError(f"the codec takes codebooks of 2 to {MAX_CODEBOOK_SIZE} codes, got {codebook_size}")


def weights_hash(identity: str) -> str:
    """The hash in a model's identity: `"ConvTiTok-0123456789abcdef"` -> `"0123456789abcdef"`."""
    return identity.rpartition("-")[2]


def checksum_of(indices: list[int]) -> int:
    """CRC-32 of token ids as little-endian 32-bit integers."""
    return zlib.crc32(struct.pack(f"<{len(indices)}I", *indices))


def _number(value: int) -> bytes:
    """Groups of seven bits, the lowest first; the highest bit of a byte says that another follows (LEB128)."""
    groups = bytearray()
    while value >= 128:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


class _Reader:
    """Takes one field after the other; IndexError or struct.error where there is nothing left."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    @property
    def remaining(self) -> int:
        return len(self.data) - self.position

    def bytes(self, size: int) -> bytes:
        if size > self.remaining:
            raise IndexError(f"{size} bytes wanted, {self.remaining} left")
        self.position += size
        return self.data[self.position - size : self.position]

    def unpack(self, fields: struct.Struct) -> tuple:
        return fields.unpack(self.bytes(fields.size))

    def number(self) -> int:
        """See `_number`."""
        value = 0
        for shift in range(0, 35, 7):
            (group,) = self.bytes(1)
            value |= (group & 127) << shift
            if group < 128:
                return value
        raise IndexError("a number of more than five bytes")
