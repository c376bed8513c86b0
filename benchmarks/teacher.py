"""A stored teacher: bytes per token, how fast it is written and read, beside a training step, and what is lost.

    python benchmarks/teacher.py                        both parts
    python benchmarks/teacher.py --tokens 65536 --threads 2

The first part stores a random teacher of 4 layers of 512 with the vocabulary of Gemma 2, reads it back in random order,
and trains a random student of 4 layers of 256 on it: reading must never be what the step waits for. The second stores
the model that ships inside on texts of the miniature corpus, with more and with fewer entries: what truncation loses is
a matter of real distributions. Run it on a machine that does nothing else.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from training_worker import STUDENT, TEACHER, ours

from cabochon.data import miniature
from cabochon.data.format import text_example
from cabochon.data.pack import Batch, pack
from cabochon.data.teacher import open_teacher
from cabochon.data.teacher_index import TeacherFacts, TeacherIndex
from cabochon.lm import load
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.distill_config import DistillConfig
from cabochon.train.objectives import stored_teacher
from cabochon.train.step import Trainer
from cabochon.train.teacher_logits import store_teacher

ROWS, LENGTH = 4, 512
ENTRIES = (4, 16, 64, 256)
KINDS = ("top-k", "sampled")


class Batches:
    """A list of batches as a stream."""

    def __init__(self, made: list[Batch]) -> None:
        self._left = iter(made)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._left)

    def state(self) -> dict[str, Any]:
        """Nothing: no process is killed here."""
        return {}

    def restore(self, state: Any, /) -> None:
        """Never called."""


def stored(model: Gemma2, made: list[Batch], out: Path, k: int, kind: Any) -> TeacherIndex:
    """Write the folder."""
    facts = TeacherFacts(
        kind=kind, k=k, vocab_size=model.config.vocab_size, temperature=1.0, length=LENGTH, teacher="random",
        tokenizer="", data={},
    )  # fmt: skip
    return store_teacher(model, Batches(made), out, facts, key={}, overwrite=True)


def rates(tokens: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Writing, reading and training with 256,000 ids and 64 entries."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(max(1, tokens // (ROWS * LENGTH))):
        ids = torch.randint(256_000, (ROWS, LENGTH + 1), generator=draw)
        made.append(
            Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros(ROWS, LENGTH, dtype=torch.int64))
        )
    teacher, student = ours(TEACHER, torch.bfloat16).eval(), ours(STUDENT, torch.float32)
    for kind in KINDS:
        started = time.perf_counter()
        index = stored(teacher, made, folder / kind, 64, kind)
        writing = time.perf_counter() - started
        with open_teacher(folder / kind, rows=ROWS, epochs=4, prefetch=0) as stream:
            next(stream)  # opens the files
            started = time.perf_counter()
            count = sum(batch.ids.numel() for batch in stream)
            reading = (time.perf_counter() - started) / count
        yield {
            "kind": kind,
            "bytes_per_token": round(index.per_token()["bytes"], 1),
            "written_tokens_per_second": round(index.totals.tokens / writing),
            "read_tokens_per_second": round(1 / reading),
            "reading_as_share_of_a_training_step": round(reading * training(student, folder / kind), 5),
        }


def training(student: Gemma2, folder: Path) -> float:
    """Tokens per second of steps on a stored teacher, the first step apart."""
    trainer = Trainer(student, TrainConfig(steps=9, rows=ROWS, length=LENGTH), stored_teacher(DistillConfig()))
    with open_teacher(folder, rows=ROWS) as stream:
        trainer.step(next(stream))
        started = time.perf_counter()
        for _ in range(3):
            trainer.step(next(stream))
        return 3 * ROWS * LENGTH / (time.perf_counter() - started)


def losses(tokens: int, folder: Path) -> Iterator[dict[str, Any]]:
    """What the model inside loses, by entries."""
    lm = load(dtype="float32")
    texts = (text_example(lm.text_tokenizer, text) for text in miniature.pretraining_documents(1))
    made = list(itertools.islice(pack(texts, ROWS, LENGTH, split=True), max(1, tokens // (ROWS * LENGTH))))
    for kind, k in itertools.product(KINDS, ENTRIES):
        means = stored(lm.model, made, folder / f"{kind}-{k}", k, kind).per_token()
        yield {"kind": kind, "k": k} | {name: round(value, 6) for name, value in means.items()}


def main() -> None:
    """Print one line of JSON for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="stored in each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for line in itertools.chain(rates(options.tokens, Path(folder)), losses(options.tokens, Path(folder))):
            print(json.dumps(line))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
