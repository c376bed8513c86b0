"""Flags that several commands share."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError

if TYPE_CHECKING:
    from cabochon.lm import LM

Model = Annotated[str | None, Parameter(help="A folder or a Hugging Face id; left out: the model that ships inside.")]
Json = Annotated[bool, Parameter(negative="", help="Print JSON for programs.")]
SystemPrompt = Annotated[
    str | None,
    Parameter(help="Instructions for the whole conversation. Gemma 2 has no system role: they lead the first turn."),
]


@Parameter(name="*", group="Where the model comes from")
@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How Hugging Face ids are fetched; without effect on folders."""

    token: Annotated[str | None, Parameter(help="Hub access token; HF_TOKEN does the same and stays private.")] = None
    offline: Annotated[bool, Parameter(negative="", help="Use only what is already on this machine.")] = False


@Parameter(name="*", group="Where the model comes from")
@dataclass(frozen=True, kw_only=True)
class HubOptions(HubAccess):
    """How a Hugging Face id is looked up; without effect on folders."""

    revision: Annotated[str | None, Parameter(help="Branch, tag or commit on the Hub.")] = None


@Parameter(name="*", group="How the model runs")
@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where and in which precision a model computes."""

    adapter: Annotated[
        str | None,
        Parameter(help="LoRA or DoRA in PEFT's format to put on the model first: a folder or a Hugging Face id."),
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Parameter(help="Precision of float weights; auto: as they are stored."),
    ] = "auto"
    weights: Annotated[
        Literal["auto", "bf16", "lossless", "int8", "int4"],
        Parameter(
            help="Form of the weights; int8 and int4 round them while loading, in 1/2 and 1/4 of the memory; "
            "lossless keeps the values of bf16 in 3/4 of it."
        ),
    ] = "auto"
    device: Annotated[str | None, Parameter(help="cpu, cuda, cuda:1, ...; left out: the best one here.")] = None
    softcap: Annotated[
        Literal["on", "off"],
        Parameter(help="off leaves the cap on attention out: faster in places, other answers."),
    ] = "on"
    draft: Annotated[
        str | None,
        Parameter(help="A smaller model with the same tokenizer, to guess tokens ahead; answers stay as they are."),
    ] = None
    speculate: Annotated[
        bool, Parameter(negative="", help="Guess tokens from what was said before; answers stay as they are.")
    ] = False
    ignore_memory: Annotated[
        bool, Parameter(negative="", help="Try to load a model that is larger than the free memory.")
    ] = False


@Parameter(name="*", group="How the answer is drawn")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What decides the next token. The same names, with underscores, as in `lm.generate`."""

    max_new_tokens: Annotated[int, Parameter(help="Longest answer in tokens.")] = 512
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token each time; 1 samples as trained.")] = 0.0
    top_k: Annotated[int, Parameter(help="Sample from the k likeliest tokens; 0: from all.")] = 0
    top_p: Annotated[float, Parameter(help="Sample from the likeliest tokens that hold this much probability.")] = 1.0
    min_p: Annotated[float, Parameter(help="Leave out tokens below this fraction of the likeliest one.")] = 0.0
    repetition_penalty: Annotated[float, Parameter(help="Above 1: tokens seen before become less likely.")] = 1.0
    presence_penalty: Annotated[float, Parameter(help="Taken from the logit of each token already in the answer.")] = (
        0.0
    )
    frequency_penalty: Annotated[float, Parameter(help="The same, once per occurrence.")] = 0.0
    stop: Annotated[
        tuple[str, ...], Parameter(negative="", help="End the answer before this text. Can be repeated.")
    ] = ()
    seed: Annotated[int | None, Parameter(help="Makes a sampled answer repeatable.")] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `LM.generate` and its relatives.

        Raises `UsageError` for a value out of range: now, and not after a large model has been loaded.
        """
        from cabochon.generate.sampling import SamplingParams

        chosen = asdict(self)
        SamplingParams(**chosen)
        return chosen


@Parameter(name="*", group="What the answer has to be")
@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """A form that the answer is held to, token by token; one of the three."""

    json_schema: Annotated[str | None, Parameter(help="JSON of this schema; @FILE reads it, {} takes any.")] = None
    regex: Annotated[str | None, Parameter(help="Text that matches this expression as a whole.")] = None
    choice: Annotated[
        tuple[str, ...], Parameter(negative="", help="One of these texts. Repeat it, once for each.")
    ] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `LM.generate`. Raises `UsageError` for a file that cannot be read."""
        chosen = {name: value for name, value in asdict(self).items() if value}
        schema = chosen.get("json_schema", "")
        if schema.startswith("@"):
            try:
                chosen["json_schema"] = Path(schema[1:]).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                cause = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise UsageError(
                    f"the schema {schema[1:]} cannot be read", cause, "check the path behind the @"
                ) from None
        return chosen


def load_arguments(model: str | None, hub: HubOptions, device: DeviceOptions) -> dict[str, Any]:
    """What `cabochon.load` is called with for the model that the flags describe."""
    chosen = asdict(device)
    softcap, ignored = chosen.pop("softcap") == "on", chosen.pop("ignore_memory")
    dtype = None if device.dtype == "auto" else device.dtype
    return {**chosen, **asdict(hub), "model": model, "dtype": dtype, "softcap": softcap, "check_memory": not ignored}


def load_lm(model: str | None, hub: HubOptions, device: DeviceOptions) -> "LM":
    """The model that the flags describe. The first thing in a command that costs more than an instant."""
    from cabochon.lm import load

    return load(**load_arguments(model, hub, device))


def text_argument(value: str, name: str) -> str:
    """A text from the command line. Raises `UsageError` when the shell handed over bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not text",
            f"character {error.start} is a byte that is not UTF-8",
            "check the encoding of the terminal, or pass the text through a file and `-`",
        ) from None
    return value


def check_disk(folder: Path, size: int, hint: str, what: str = "the model") -> None:
    """Raises `MissingResource` when fewer than `size` bytes are free where a folder is to be written."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise MissingResource(
            f"{folder} does not fit on the disk",
            f"{what} takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
            hint,
        )


def folder_argument(value: Path, name: str) -> Path:
    """A path for output, home folder expanded. Raises `UsageError` when it is an existing file."""
    path = value.expanduser()
    if path.exists() and not path.is_dir():
        raise UsageError(f"{name} {path} cannot be written", "it is a file, not a folder", "name a new folder")
    return path
