"""A run in a folder: what is trained, on what, and everything that makes it safe to stop at any moment.

OUT/config.json, model.safetensors, tokenizer...   the result, once the run is done: a model folder
OUT/checkpoints/000400/                            to go on from, and a model folder as well
OUT/settings.toml                                  what was asked for, to be read by --config again
OUT/log.jsonl, OUT/loss.svg                        what happened
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.files import atomic_folder, atomic_write, only_writer
from cabochon.base.toml import toml_value
from cabochon.data.pack import Batch
from cabochon.data.stream import merge_states
from cabochon.train import checkpoint
from cabochon.train.background import BackgroundSaver
from cabochon.train.log import Log, Record, Tracker
from cabochon.train.loop import Hooks, Measure, Progress, evaluate, next_batch, next_token_loss, train_steps
from cabochon.train.optim import trainable
from cabochon.train.ranks import Ranks
from cabochon.train.spikes import Diverged
from cabochon.train.step import Trainer
from cabochon.train.stop import noted_signals
from cabochon.train.throughput import Throughput
from cabochon.train.whole import Whole, writing

SETTINGS = "settings.toml"
DONE = "config.json", "adapter_config.json"  # either makes OUT a finished model


class Stream(Protocol):
    """Batches that know where they are: `state` describes what comes next, and `restore` goes there.

    With several ranks each has its own; a checkpoint holds their states merged (`merge_states`). `empty` is a batch for
    ranks that are at their end before others. `remarks` are what the user should know of the rows.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def empty(self) -> Batch: ...
    def remarks(self) -> list[str]: ...


@dataclass
class Run:
    """Everything that a run is made of.

    Args:
        out: its folder.
        trainer: model, optimizers and so on.
        stream: the data.
        weights: how checkpoints hold the weights.
        export: writes the result into an empty folder, asking for parameters by name; the first rank calls it.
        settings: what decides the result. A run that goes on has to have the same.
        asked: what was asked for, flags and all, for settings.toml.
        held_out: opens the data of evaluations; None: there are none.
        measure: what evaluations measure.
        summary: what is made of the means of that, before it is logged.
        average: where weights are averaged, the average is evaluated and exported; otherwise it only goes along.
        curves: what besides losses is drawn, with what is written at its axis.
        trackers: what starts others that are told what log.jsonl is, after so many steps.
        show: called with every record of the log.
        note: called with what the user should know.
    """

    out: Path
    trainer: Trainer
    stream: Stream
    weights: checkpoint.Weights
    export: Callable[[Path, Whole], None]
    settings: Mapping[str, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)
    held_out: Callable[[], Iterator[Batch]] | None = None
    measure: Measure = next_token_loss
    summary: Callable[[Mapping[str, float]], dict[str, float]] = dict
    average: bool = True
    curves: Mapping[str, str] = field(default_factory=dict)
    trackers: Callable[[int], tuple[Tracker, ...]] = lambda _: ()
    show: Callable[[Record], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None
    _saver: BackgroundSaver | None = field(default=None, init=False)
    _log: Log | None = field(default=None, init=False)  # of the first rank

    def go(self, *, resume: bool = True) -> int:
        """Run to the end, from the last whole checkpoint if there is one.

        Returns:
            0 when the run is done, or the number of the signal that stopped it; then it was saved.

        Raises:
            UsageError: the folder holds another run, or something else.
            BadInput: the loss is no number any more, or the checkpoint is of another model.
            MissingResource: the disk is full, or another process of the run is gone. The last checkpoint is kept.
        """
        with self.ranks.watched(), ExitStack() as held:
            self.ranks.on_first(lambda: self._take(held, resume))
            return self._go(resume)

    @property
    def ranks(self) -> Ranks:
        """The processes of the run. All of them do what is done here; the first one writes and reports."""
        return self.trainer.ranks

    def _take(self, held: ExitStack, resume: bool) -> None:
        """Hold the folder until the run ends: two processes in it would write over each other's checkpoints."""
        _check_folder(self.out, resume=resume)
        try:
            held.enter_context(only_writer(self.out))
        except OSError as error:
            raise _unwritable(self.out, error) from None

    def _go(self, resume: bool) -> int:
        ranks = self.ranks
        found = checkpoint.latest(self.out, self.note, ranks) if resume else None
        if found:
            self._restore(found)
        trainer = self.trainer
        done = trainer.step_number >= trainer.config.steps
        if done and ranks.on_first(self._published):
            self._note(f"{self.out} is done: {trainer.step_number} steps")
            return 0
        ranks.on_first(self._open)
        log = self._log
        if trainer.config.sharded_checkpoints and ranks.world > 1:
            self._saver = BackgroundSaver(self.out, trainer)
        feed = _Feed(self.stream, trainer.step_number, ranks)
        signal = 0
        with noted_signals() as came:

            def stopped() -> bool:
                nonlocal signal
                signal = signal or ranks.most(came())
                return signal != 0

            hooks = Hooks(
                report=_Reporter(self, log) if log else _ignore,
                evaluate=lambda step: self._evaluate(step, log, stopped),
                save=lambda step: self._save(feed.state_at(step)),
                stop=stopped,
            )
            owed = self._owes_an_evaluation(log)
            ended = (not owed or hooks.evaluate(trainer.step_number)) and self._train(feed, hooks)
            for remark in self.stream.remarks():
                self.note(remark)
            if not ended:
                return signal
            self._publish(log)
        return 0

    def _published(self) -> bool:
        """Whether the result is there. What a process that was killed right then left beside it goes."""
        there = any((self.out / name).exists() for name in DONE)
        if there:
            shutil.rmtree(self.out / ".result", ignore_errors=True)
        return there

    def _open(self) -> None:
        self._write_settings()
        step = self.trainer.step_number
        self._log = Log(self.out, step, self.trackers(step), self.curves)

    def _train(self, feed: "_Feed", hooks: Hooks) -> bool:
        """The steps; also when they fail, a checkpoint that is being written becomes whole."""
        try:
            ended = train_steps(self.trainer, feed, hooks)
            if self._saver:
                self._saver.wait()
            return ended
        except Diverged as error:
            if not self.trainer.spikes.losses:
                raise  # nothing was learnt
            step = self.trainer.step_number
            self._save(
                feed.state_at(step), spare=1
            )  # what it learnt may be bad already: no good checkpoint goes for it
            folder = checkpoint.folder_of(self.out, step)
            raise Diverged(error.what, error.cause, f"{error.hint}; what was learnt before is in {folder}") from None
        finally:
            if self._saver:
                self._saver.finish()

    def _note(self, text: str) -> None:
        if self.ranks.first:
            self.note(text)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.ranks.on_first(lambda: self._check_settings(found))
        checkpoint.restore(found, self.trainer, self.weights)
        self.stream.restore(found.facts["data"])
        self._note(f"going on from {found.folder}, step {found.step} of {self.trainer.config.steps}")

    def _check_settings(self, found: checkpoint.Checkpoint) -> None:
        before, now = found.facts["settings"], json.loads(json.dumps(dict(self.settings)))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            name = changed[0]
            others = f" (and {', '.join(changed[1:])})" if changed[1:] else ""
            raise UsageError(
                f"{self.out} holds a run with other settings",
                f"{name} was {before.get(name)!r} and is {now.get(name)!r}{others}",
                "give the settings in its settings.toml to go on with it, or name a new folder",
            )

    def _owes_an_evaluation(self, log: Log | None) -> bool:
        """Whether a signal came into the evaluation of the step that the run goes on from."""
        trainer = self.trainer
        step, every = trainer.step_number, trainer.config.eval_every
        due = step > 0 and (step == trainer.config.steps or bool(every and step % every == 0))
        if not due or self.held_out is None:
            return False
        return self.ranks.on_first(lambda: log is not None and not log.has_evaluation(step))

    def _evaluate(self, step: int, log: Log | None, stop: Callable[[], bool]) -> bool:
        """Whether it came to its end."""
        if self.held_out is None:
            return True
        trainer = self.trainer
        self._swap_average()
        found = evaluate(trainer.model, self.held_out(), trainer.config, self.ranks, stop, self.measure)
        self._swap_average()
        if log and found is not None:
            record = {"step": step} | {f"eval_{name}": value for name, value in self.summary(found).items()}
            log.add(record)
            log.draw(self.out.name)
            self.show(record)
        return found is not None

    def _swap_average(self) -> None:
        if self.trainer.average and self.average:
            self.trainer.average.swap(self.trainer.model)

    def _save(self, data: dict[str, Any], spare: int = 0) -> None:
        """Write a checkpoint, and keep so many more than usual."""
        if self.ranks.world > 1:
            states = self.ranks.gather(data)[:: self.ranks.tensor_parallel]
            # A stored teacher's rows are counted over all ranks, so that all say the same.
            data = states[0] if all(state == states[0] for state in states) else merge_states(states)
        facts = {"settings": dict(self.settings), "data": data}
        keep = self.trainer.config.keep + spare
        if self._saver:
            self._saver.save(facts, keep)
        else:
            checkpoint.save(self.out, self.trainer, self.weights, facts, keep)

    def _write_settings(self) -> None:
        lines = (f"{name} = {toml_value(value)}\n" for name, value in self.asked.items())
        try:
            with atomic_write(self.out / SETTINGS) as file:
                file.write("".join(lines).encode())
        except OSError as error:
            raise _unwritable(self.out, error) from None

    def _publish(self, log: Log | None) -> None:
        # Killed between its last checkpoint and this, a process may have left one too many.
        self.ranks.on_first(lambda: checkpoint.remove_old(self.out, self.trainer.config.keep))
        if log:
            log.draw(self.out.name)
        self._swap_average()
        writing(self.ranks, trainable(self.trainer.model), self._write_result)

    def _write_result(self, whole: Whole) -> None:
        """Put the result into the run's folder. Its configuration comes last: without it, it is no model yet."""
        try:
            with atomic_folder(self.out / ".result", overwrite=True) as folder:
                self.export(folder / "model", whole)
            files = sorted((self.out / ".result" / "model").iterdir(), key=lambda file: file.name in DONE)
            for file in files:
                file.replace(self.out / file.name)
            (self.out / ".result" / "model").rmdir()
            (self.out / ".result").rmdir()
        except OSError as error:
            raise MissingResource(
                f"the result was not written to {self.out}",
                error.strerror or str(error),
                "free some space and start the same command again: only this is left to do",
            ) from None


def _unwritable(out: Path, error: OSError) -> MissingResource:
    return MissingResource(f"{out} cannot be written", error.strerror or str(error), "name another folder with --out")


def _ignore(progress: Progress) -> None:
    """Only the first rank reports."""


class _Feed:
    """The stream, and where it stood before the batch that was last handed out."""

    def __init__(self, stream: Stream, step: int, ranks: Ranks) -> None:
        self.stream, self.taken, self.ranks = stream, step, ranks
        self.before = stream.state()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before = self.stream.state()
        batch = next_batch(self.stream, self.ranks)
        if batch is None:
            raise StopIteration
        self.before, self.taken = before, self.taken + 1
        return batch

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the data stands when so many steps are done: the batch of a step given up is still to come."""
        return self.stream.state() if self.taken == step else self.before


class _Reporter:
    """Progress to the log, with the share of the machine's speed."""

    def __init__(self, run: Run, log: Log) -> None:
        self.run, self.log = run, log
        self.throughput = Throughput(run.trainer.model, run.trainer.config)

    def __call__(self, progress: Progress) -> None:
        share = self.throughput.share(progress.tokens_per_second / self.run.ranks.world)
        record = {
            "step": progress.step,
            "loss": progress.loss,
            **progress.measures,
            "grad_norm": progress.grad_norm,
            "learning_rate": progress.learning_rate,
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens_per_second, 1),
            "share_of_peak": round(share, 4),
            "seconds_per_step": round(progress.seconds_per_step, 4),
            "skipped": progress.skipped,
        }
        self.log.add(record)
        self.run.show(record)


def _check_folder(out: Path, *, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} cannot hold a run", "it is a file, not a folder", "name another folder with --out")
    there = sorted(file.name for file in out.iterdir()) if out.exists() else []
    if there and SETTINGS not in there:
        raise UsageError(
            f"{out} cannot hold a run", f"there is something else in it ({there[0]})", "name a new folder with --out"
        )
    if there and not resume:
        raise UsageError(
            f"{out} holds a run already", "--resume never starts anew", "name a new folder, or go on: --resume auto"
        )
