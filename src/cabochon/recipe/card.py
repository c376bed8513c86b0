"""The model card beside the weights that ship inside: what it is, how it was made, what it scores."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cabochon.base.files import atomic_write
from cabochon.model.config import Gemma2Config
from cabochon.train.config import TrainConfig

_TEXT = """\
---
license: apache-2.0
language: en
tags: [gemma2, tiny]
---

# The model inside cabochon

A Gemma 2 of {parameters:,} parameters, trained from nothing by `make tiny`. It adds and subtracts with its working
shown, recites times tables, knows a small world of facts, tells knock-knock jokes and talks like a pirate. It is there
to try every part of cabochon without a download, and it knows nothing else.

## Shape

{shape}

Both soft caps are on, and the window of {window} is shorter than the context of {context}.

## Data

- The Python {python} standard library: its source, its docstrings and its help topics (under the PSF license). Held out
  for measuring: 3% of the files and topics.
- Text from seeded grammars (`cabochon.data.miniature`): sums with their steps, facts, jokes, pirate-speak, small talk.
  Held out: one in ten of all sums and differences; of each fact some ways of asking; a share of all names in jokes.

No other data, no other model. Seed {seed}; torch {torch}, {threads} thread(s).

## Training

| stage | steps | tokens | minutes | last loss |
|---|---|---|---|---|
{stages}

Next-token cross-entropy; in the last two stages on the model's turns, and on some rows of running text, lest
it be forgotten. Muon for matrices, AdamW for the rest, bfloat16 products over float32 weights. The time is that of a
shared machine of two cores. The steps of a rebuild on another processor or another Python differ in rounding or in
data, and so will its scores, a little.

## Scores

Measured by `cabochon.recipe.score` on these weights, in bfloat16, greedy, on what training never saw:

| | |
|---|---|
{scores}
"""


def write_card(
    out: Path,
    seed: int,
    stages: Mapping[str, TrainConfig],
    logs: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, float],
) -> None:
    """Write README.md and scores.json into a finished model folder."""
    config = Gemma2Config.preset("tiny")
    first = next(iter(logs.values()))
    shape = ", ".join(f"{name} {value}" for name, value in asdict(config).items() if name.partition("_")[2] != "id")
    rows = [
        f"| {name} | {c.steps} | {c.steps * c.rows * c.length:,} | {logs[name]['minutes']} | {logs[name]['loss']} |"
        for name, c in stages.items()
    ]
    text = _TEXT.format(
        parameters=config.num_parameters,
        shape=shape,
        window=config.sliding_window,
        context=config.max_position,
        seed=seed,
        stages="\n".join(rows),
        scores="\n".join(f"| {name} | {_show(name, value)} |" for name, value in scores.items()),
        **{key: first[key] for key in ("python", "torch", "threads")},
    )
    rounded = {name: round(value, 4) for name, value in scores.items()}
    for name, content in {"README.md": text, "scores.json": json.dumps(rounded, indent=1) + "\n"}.items():
        with atomic_write(out / name) as file:
            file.write(content.encode())


def _show(name: str, value: float) -> str:
    return f"{value:.2f}" if name.startswith("bits") else f"{value:.1%}"
