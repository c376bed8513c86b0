"""`cabochon teacher-logits`: what a teacher says about a text, stored for students to learn from."""

import json as json_format
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubOptions, Json, Model, check_disk, folder_argument
from cabochon.cli.train_options import DataOptions, Device
from cabochon.train.config import TrainConfig

if TYPE_CHECKING:
    from cabochon.data.config import DataConfig
    from cabochon.data.teacher_index import TeacherIndex
    from cabochon.lm import LM
    from cabochon.train.teacher_logits import Stored

Out = Annotated[Path, Parameter(help="The folder to write.")]
QUIET = 60  # seconds between two lines about progress where there is no terminal


@Parameter(name="*", group="What is stored")
@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How much of the teacher's distribution, at which positions."""

    k: Annotated[int, Parameter(help="Entries of each position, 4.25 bytes each.")] = 64
    sampled: Annotated[
        bool, Parameter(negative="", help="k ids drawn without bias, for forward-kl, instead of the k likeliest.")
    ] = False
    temperature: Annotated[float, Parameter(help="What logits are divided by. Students have to learn at the same.")] = (
        1.0
    )
    rows: Annotated[int, Parameter(help="Rows that go through the teacher at once.")] = 8
    length: Annotated[int, Parameter(help="Tokens in a row, into which documents are packed.")] = 1024
    steps: Annotated[int, Parameter(help="Stop after so many times --rows; 0: when the data ends.")] = 0
    seed: Annotated[int, Parameter(help="Of the order, of what is held out, and of what is drawn.")] = 0


@Parameter(name="*", group="How the teacher runs")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where and in which precision."""

    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Parameter(help="Precision of float weights; auto: as they are stored."),
    ] = "auto"
    weights: Annotated[
        Literal["auto", "bf16", "lossless", "int8", "int4"],
        Parameter(help="Form of the weights; int8 and int4 round them while loading."),
    ] = "auto"
    device: Device = None
    ignore_memory: Annotated[
        bool, Parameter(negative="", help="Try to load a model that is larger than the free memory.")
    ] = False


def teacher_logits(
    model: Model = None,
    /,
    *,
    data: DataOptions = DataOptions(),
    out: Out,
    store: StoreOptions = StoreOptions(),
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a folder that is not empty.")] = False,
    json: Json = False,
    load: LoadOptions = LoadOptions(),
    hub: HubOptions = HubOptions(),
) -> None:
    """Store what a teacher says at each token of a text: a few entries of its distribution, 286 bytes for 64.

    Students then learn from the folder without the teacher. The same command goes on where it was interrupted.

    Example: cabochon teacher-logits google/gemma-2-9b --data texts.jsonl --out teacher-9b --sampled

    Example: cabochon teacher-logits my-model --data chats.jsonl --out teacher --k 32 --weights int8
    """
    target = folder_argument(out, "--out")
    for name in ("k", "rows", "length"):
        if getattr(store, name) < 1:
            raise UsageError(f"--{name} cannot be {getattr(store, name)}", "it has to be at least 1", "leave it out")
    if data.eval_data:
        raise UsageError("--eval-data has no effect here", "a stored teacher is for training", "leave it out")
    rows = data.config(TrainConfig(steps=store.steps, seed=store.seed))
    from cabochon.lm import load as load_lm
    from cabochon.weights.hub import resolve

    folder = resolve(model, **asdict(hub))
    lm = load_lm(
        folder,
        dtype=None if load.dtype == "auto" else load.dtype,
        weights=load.weights,
        device=load.device,
        check_memory=not load.ignore_memory,
    )
    begun_with = {"weights": load.weights, "dtype": load.dtype, "rows": store.rows, "files": _identity(folder)}
    index = _store(lm, model or "tiny", rows, store, target, begun_with, overwrite)
    answer = {"folder": str(target), **index.facts.to_json(), **asdict(index.totals), "per_token": index.per_token()}
    print(json_format.dumps(answer) if json else target)


def _store(
    lm: "LM",
    name: str,
    rows: "DataConfig",
    store: StoreOptions,
    target: Path,
    begun_with: dict[str, Any],
    overwrite: bool,
) -> "TeacherIndex":
    from cabochon.base.files import unfinished_bytes
    from cabochon.base.progress import track
    from cabochon.data.stream import open_stream
    from cabochon.data.teacher_format import fingerprint, position_bytes
    from cabochon.data.teacher_index import TeacherFacts
    from cabochon.train.teacher_logits import store_teacher

    tokenizer, size = lm.text_tokenizer, lm.config.vocab_size
    facts = TeacherFacts(
        kind="sampled" if store.sampled else "top-k",
        k=store.k,
        vocab_size=size,
        temperature=store.temperature,
        length=store.length,
        teacher=name,
        tokenizer=fingerprint(tokenizer),
        data=rows.settled(),
    )
    with open_stream(rows, tokenizer, rows=store.rows, length=store.length) as stream:
        total = store.steps or None
        if rows.epochs and not any(_passes_once(source) for source in rows.sources):
            counted = stream.count()
            total = min(total or counted, counted)
        if total:
            most = total * store.rows * store.length * position_bytes(store.k, size)
            hint = "free some space, store fewer entries (--k), or name a folder on another disk"
            check_disk(target, most - unfinished_bytes(target), hint, "what is to be stored")
        with track(total, "storing", unit="batches") as advance:
            shown = Shown(advance, total, store.rows * store.length)
            index = store_teacher(
                lm.model, stream, target, facts,
                key=begun_with, batches=store.steps or None, seed=store.seed, report=shown, overwrite=overwrite,
            )  # fmt: skip
    print(f"{told(index)}; {shown.rate:,.0f} tokens/s", file=sys.stderr)
    return index


class Shown:
    """Called with what is done: moves the bar, and where there is none, prints a line now and then.

    Args:
        advance: moves the bar by so many batches.
        total: batches, where that is known.
        size: tokens of a batch.
    """

    def __init__(self, advance: Callable[[float], None], total: int | None, size: int) -> None:
        self._advance, self._total, self._size = advance, total, size
        self._batches, self._first = 0, -1
        self._started = self._said = time.perf_counter()
        self.rate = 0.0  # tokens per second, of this process

    def __call__(self, stored: "Stored") -> None:
        """What `store_teacher` reports; its first report is of what earlier processes did."""
        now = time.perf_counter()
        self._advance(stored.batches - self._batches)
        if self._first < 0:
            self._first, self._started = stored.batches, now
        self._batches = stored.batches
        self.rate = (self._batches - self._first) * self._size / max(1e-9, now - self._started)
        if not sys.stderr.isatty() and now - self._said > QUIET:
            self._said = now
            of = f"/{self._total}" if self._total else ""
            lost = stored.totals.kl_lost / max(1, stored.totals.tokens)
            print(f"batch {self._batches}{of}  {self.rate:,.0f} tokens/s  KL lost {lost:.4f}", file=sys.stderr)


def told(index: "TeacherIndex") -> str:
    """What was stored and what was lost, in words."""
    means = index.per_token()
    size = f"{index.totals.tokens:,} tokens, {means['bytes']:.0f} bytes each"
    if index.facts.kind == "sampled":
        return f"{size}; nothing lost in expectation, {means['left_out']:.2%} of the probability is drawn"
    return f"{size}; {means['kl_lost']:.4f} nats of KL lost, {means['left_out']:.2%} of the probability left out"


def _passes_once(source: str) -> bool:
    """Whether a source cannot, or should not, be read once more just to count."""
    return source == "-" or source.startswith("hf:")


def _identity(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a model's files: another teacher under the same name does not go on with this one's."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
