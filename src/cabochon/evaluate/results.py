"""What an evaluation found, as plain records that are written to JSON and read back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.base.files import atomic_write

REPORT, ITEMS = "report.json", "items"


@dataclass(frozen=True)
class Result:
    """One metric of one task or group.

    Attributes:
        label: what tables call the task.
        value: a share of right answers between 0 and 1, or bits per byte, or whatever the metric says.
        stderr: its standard error over items, where there is one.
        counts: whether it is the metric of a suite, or else the task's first.
        part_of: the group that a task was run in.
        random, majority: what guessing scores, where that is known.
        published: scores of others, on the scale of `value`.
    """

    task: str
    label: str
    metric: str
    value: float
    stderr: float | None
    items: int
    shots: int | None
    higher_is_better: bool
    counts: bool = True
    part_of: str | None = None
    truncated: int = 0
    random: float | None = None
    majority: float | None = None
    published: dict[str, float] = field(default_factory=dict)

    @property
    def percent(self) -> bool:
        """Whether it is a share, and printed in percent."""
        return self.metric.split(",")[0] not in ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")


@dataclass(frozen=True)
class Failure:
    """A task that could not be run, in the three lines of an error."""

    task: str
    what: str
    cause: str
    hint: str
    exit_code: int

    @classmethod
    def of(cls, task: str, error: CabochonError) -> "Failure":
        """From an error."""
        return cls(task, error.what, error.cause, error.hint, error.exit_code)

    def __str__(self) -> str:
        return f"error: {self.what}\n  cause: {self.cause}\n  hint: {self.hint}"


@dataclass(frozen=True)
class Spread:
    """A score over several formats of the same prompts: mean, standard deviation over formats, extremes."""

    task: str
    metric: str
    formats: int
    mean: float
    deviation: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Report:
    """Everything about a run but its items."""

    model: str
    settings: dict[str, Any]
    results: list[Result]
    failures: list[Failure]
    spreads: list[Spread]
    notes: list[str]
    seconds: float

    def write(self, folder: Path) -> None:
        """Into a folder, which is made if needed. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / REPORT) as file:
            file.write(json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())


Item = dict[str, Any]


def write_items(folder: Path, task: str, items: list[Item]) -> None:
    """The items of a task, one JSON object on each line. Raises `OSError`."""
    (folder / ITEMS).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / ITEMS / f"{task}.jsonl") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")


def read_report(folder: Path) -> Report:
    """Raises `MissingResource` when a folder has no report, `BadInput` when it cannot be read as one."""
    path = folder / REPORT if folder.is_dir() else folder
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"results": Result, "failures": Failure, "spreads": Spread}
        lists = {name: [kind(**one) for one in raw[name]] for name, kind in kinds.items()}
        return Report(**{**raw, **lists})
    except OSError as error:
        hint = "name a folder that `cabochon eval --out FOLDER` wrote"
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), hint) from None
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{path} is not a report", "it lacks what reports have", "run the evaluation again") from None


def read_items(folder: Path, task: str) -> list[Item]:
    """The items of a task; none where there is no such file. Raises `BadInput`."""
    path = folder / ITEMS / f"{task}.jsonl"
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
    except ValueError:
        raise BadInput(f"{path} cannot be read", "it is not lines of JSON", "run the evaluation again") from None
