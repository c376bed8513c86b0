"""Text from standard input, taken as UTF-8 and as nothing else."""

from collections.abc import Iterator
from typing import BinaryIO

from cabochon.base.errors import BadInput


def lines(source: BinaryIO) -> Iterator[str]:
    """Lines without their ends, each as soon as it is there. Raises `BadInput` naming the first bad byte."""
    offset = 0
    for raw in source:
        yield decode(raw, offset).rstrip("\r\n")
        offset += len(raw)


def decode(raw: bytes, offset: int = 0) -> str:
    """Strict UTF-8; `offset` is where `raw` began in the input. A byte order mark at the start is left out."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            "the input is not text",
            f"byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8: {error.reason}",
            "convert the input first, for example with: iconv -t UTF-8",
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text
