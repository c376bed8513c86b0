"""How near training on this machine is to its rate of multiplying, and what packing rows is worth.

    python benchmarks/training_rate.py --rounds 2

A model of 12 layers, 512 wide, with a vocabulary of 8192: the share of the rate of one large bfloat16 product, over
whole steps, optimizer and all. Then a smaller one on conversations of the miniature corpus, in packed rows and with
each in a row of its own: real tokens per second of both, beside the share of their rows that is real.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from cabochon.base.machine import keep_freed_memory
from cabochon.data import miniature
from cabochon.data.config import DataConfig
from cabochon.data.pack import Batch
from cabochon.data.stream import open_stream
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.config import Optimizers, TrainConfig
from cabochon.train.objectives import next_tokens
from cabochon.train.step import Trainer
from cabochon.train.throughput import matrix_rate, operations
from cabochon.weights.hub import built_in

WIDE = Gemma2Config(
    vocab_size=8192, hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=2048,
    query_pre_attn_scalar=64,
)  # fmt: skip
ROWS, LENGTH, DOCUMENT = 16, 1024, 200
CHAT_ROWS, CHAT_LENGTH, CHAT_STEPS = 16, 256, 6


def trainer(config: Gemma2Config, optimizer: Optimizers, rows: int, length: int) -> Trainer:
    """A fresh model and what trains it."""
    torch.manual_seed(0)
    model = Gemma2(config)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    settings = TrainConfig(steps=1000, rows=rows, length=length, optimizer=optimizer, learning_rate=1e-4)
    return Trainer(model, settings, next_tokens(settings))


def step_seconds(one: Trainer, batch: Batch, steps: int) -> float:
    """The fastest of some steps after one that does not count."""
    one.step(batch)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        one.step(batch)
        times.append(time.perf_counter() - started)
    return min(times)


def share(optimizer: Optimizers) -> tuple[float, float]:
    """Share of the rate of a large product, and tokens per second."""
    ids = torch.randint(0, WIDE.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], (torch.arange(LENGTH) // DOCUMENT).expand(ROWS, LENGTH))
    rate = matrix_rate(torch.device("cpu"), torch.bfloat16)
    tokens = ROWS * LENGTH / step_seconds(trainer(WIDE, optimizer, ROWS, LENGTH), batch, 2)
    return tokens * operations(WIDE, LENGTH) / rate, tokens


def chats(folder: Path) -> DataConfig:
    """Conversations as rows of a file."""
    path = folder / "chats.jsonl"
    talks = itertools.islice(miniature.conversations(3), 4000)
    path.write_text("".join(json.dumps({"messages": list(talk)}) + "\n" for talk in talks), encoding="utf-8")
    return DataConfig(sources=(str(path),))


def real_tokens(data: DataConfig) -> tuple[float, float]:
    """Real tokens per second of training, and the share of positions that are real."""
    one = trainer(replace(Gemma2Config.preset("tiny"), num_layers=4), "adamw", CHAT_ROWS, CHAT_LENGTH)
    with open_stream(data, load_tokenizer(built_in()), rows=CHAT_ROWS, length=CHAT_LENGTH) as stream:
        one.step(next(stream))
        before, started = stream.real_tokens, time.perf_counter()
        for _ in range(CHAT_STEPS):
            one.step(next(stream))
        seconds, real = time.perf_counter() - started, stream.real_tokens - before
    return real / seconds, real / (CHAT_STEPS * CHAT_ROWS * CHAT_LENGTH)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    for optimizer in ("adamw", "muon"):
        shares, tokens = zip(*(share(optimizer) for _ in range(options.rounds)), strict=True)
        print(f"{optimizer}: {statistics.median(shares):.1%} of the rate, {statistics.median(tokens):,.0f} tokens/s")
    with tempfile.TemporaryDirectory() as folder:
        data = chats(Path(folder))
        packed, padded = [], []
        for _ in range(options.rounds):
            packed.append(real_tokens(data))
            padded.append(real_tokens(replace(data, packing=False)))
    (fast, full), (slow, sparse) = (
        (statistics.median(v) for v in zip(*runs, strict=True)) for runs in (packed, padded)
    )
    print(f"packed {fast:,.0f} real tokens/s in rows {full:.1%} real; padded {slow:,.0f} in rows {sparse:.1%} real")
    print(f"packed / padded: {fast / slow:.2f} x the real tokens, {full / sparse:.2f} by the share that is real")


if __name__ == "__main__":
    main()
