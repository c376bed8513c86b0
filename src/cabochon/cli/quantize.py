"""`cabochon quantize`: a copy of a model with 8- or 4-bit weights."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError
from cabochon.cli.options import HubOptions, Json, check_disk, folder_argument
from cabochon.cli.stdin import decode

if TYPE_CHECKING:
    from cabochon.weights.scheme import Scheme

GIB = 2**30


def quantize(
    src: Annotated[str, Parameter(help="A folder or a Hugging Face id, with float weights.")],
    dst: Annotated[Path, Parameter(help="The folder to write.")],
    /,
    *,
    bits: Annotated[Literal[8, 4], Parameter(help="Bits of a weight.")],
    method: Annotated[
        Literal["auto", "rtn", "gptq"],
        Parameter(help="rtn rounds to the nearest, gptq calibrates 4 bits; auto: rtn for 8 bits, gptq for 4."),
    ] = "auto",
    embedding_bits: Annotated[
        Literal[8, 4] | None,
        Parameter(help="Bits of the embedding, which is also the head; left out: 8 with gptq, else as --bits."),
    ] = None,
    group: Annotated[
        Literal[32, 64, 128] | None,
        Parameter(help="Input channels that share a scale; left out: 128 with 8 bits, 64 with 4."),
    ] = None,
    text: Annotated[
        tuple[Path, ...],
        Parameter(negative="", help="Calibrate on this file instead of the built-in texts. Can be repeated."),
    ] = (),
    device: Annotated[str | None, Parameter(help="Where gptq computes; left out: the best one here.")] = None,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a folder that is not empty.")] = False,
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> None:
    """Write a model with 8- or 4-bit weights, which then loads at once and in 1/2 or 1/4 of the memory.

    8 bits answer as 16 do. 4 bits are calibrated, block by block: on two cores, about half an hour for 2b.

    Example: cabochon quantize google/gemma-2-2b-it gemma-2b-int8 --bits 8

    Example: cabochon quantize my-model my-model-int4 --bits 4 --text my-texts.txt
    """
    target = folder_argument(dst, "DST")
    chosen: Any = method if method != "auto" else {8: "rtn", 4: "gptq"}[bits]
    if text and chosen != "gptq":
        raise UsageError("--text has no effect here", f"{chosen} does not calibrate", "leave it out")
    texts = [_read(path.expanduser()) for path in text]
    from cabochon.weights.folder import describe
    from cabochon.weights.hub import resolve
    from cabochon.weights.scheme import Scheme

    scheme = Scheme(bits, group or 0, chosen, embedding_bits or (8 if chosen == "gptq" else bits))
    source = resolve(src, **asdict(hub))
    facts = describe(source)
    size = scheme.nbytes(facts.config)
    check_disk(target, size, "free some space, or name a folder on another disk")
    print(f"{facts.parameters:,} weights to {scheme}: {size / GIB:.2f} GiB", file=sys.stderr)
    _quantize(source, target, scheme, size, texts, device, overwrite)
    answer = {"folder": str(target), **asdict(scheme), "bytes": size, "bytes_before": facts.nbytes}
    print(json_format.dumps(answer) if json else target)


def _quantize(
    source: Path, target: Path, scheme: "Scheme", size: int, texts: list[str], device: str | None, overwrite: bool
) -> None:
    import torch

    from cabochon.base.progress import track
    from cabochon.lm.quantize import quantize as write

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with track(size, "quantising", unit="bytes") as advance:
        write(source, target, scheme, texts=texts, device=where, report=advance, overwrite=overwrite)


def _read(path: Path) -> str:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check the path") from None
