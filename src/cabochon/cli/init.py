"""`cabochon init`: a model folder with random weights."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from cabochon.cli.options import Json, check_disk, folder_argument
from cabochon.model.config import Gemma2Config


def init(
    *,
    preset: Annotated[Literal["tiny", "2b", "9b", "27b"], Parameter(help="Which published shape.")],
    out: Annotated[Path, Parameter(help="The folder to write.")],
    seed: Annotated[int, Parameter(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[Literal["bfloat16", "float32"], Parameter(help="Precision of the weights.")] = "bfloat16",
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a folder that is not empty.")] = False,
    json: Json = False,
) -> None:
    """Make a model with random weights, to measure speed or to train from scratch.

    It comes with a tokenizer of the right size and in the Hugging Face layout.

    Example: cabochon init --preset 2b --out my-model
    """
    config, folder = Gemma2Config.preset(preset), folder_argument(out, "--out")
    size = config.num_parameters * (2 if dtype == "bfloat16" else 4)
    check_disk(folder, size, "free some space, or choose another disk with --out")
    print(f"making {config.num_parameters:,} weights, {size / 2**30:.2f} GiB", file=sys.stderr)
    _write(config, folder, seed, dtype, overwrite)
    answer = {"folder": str(folder), "parameters": config.num_parameters, "bytes": size}
    print(json_format.dumps(answer) if json else folder)


def _write(config: Gemma2Config, folder: Path, seed: int, dtype: str, overwrite: bool) -> None:
    import torch

    from cabochon.weights.init import init_folder

    init_folder(config, folder, dtype=getattr(torch, dtype), seed=seed, overwrite=overwrite)
