"""`cabochon merge --sweep`: what a merge scores on a file, for each value of a parameter."""

import json as json_format
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.base.errors import MissingResource
from cabochon.cli.options import HubAccess

if TYPE_CHECKING:
    from cabochon.lm.examples import Examples
    from cabochon.merge.axes import Axis
    from cabochon.merge.config import MergeConfig
    from cabochon.merge.run import Merge
    from cabochon.merge.sweep import Point
    from cabochon.model.gemma2 import Gemma2
    from cabochon.text.tokenizer import Tokenizer


def sweep(
    config: "MergeConfig",
    texts: Sequence[str],
    on: Path,
    *,
    plot: Path | None,
    seed: int,
    threads: int,
    json: bool,
    hub: HubAccess,
) -> None:
    """Carry a sweep out, print it and draw it. `texts` are axes as they were typed."""
    from cabochon.merge.axes import at, grid, parse_axis
    from cabochon.merge.run import Merge

    axes = [parse_axis(text) for text in texts]
    # The first point in the place of the file's values, which need not be there.
    work = Merge.prepare(at(config, axes, grid(axes)[0]), seed=seed, **asdict(hub))
    for note in work.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    tokenizer = _tokenizer(work)
    from cabochon.lm.examples import read_examples

    on = on.expanduser()
    examples = read_examples(on, tokenizer, work.plan.shape.max_position)
    points = _measured(work, axes, on, examples, tokenizer, plot, threads)
    best = min((p for p in points if math.isfinite(p.scores["bits_per_byte"])), key=_rank, default=None)
    if plot:
        from cabochon.merge.show import sweep as drawn

        write_plot(plot, drawn(axes, points, next(iter(points[0].scores)), title=f"{config.method} on {on.name}"))
    if json:
        print(json_format.dumps({"points": [_plain(axes, p) for p in points], "best": best and _plain(axes, best)}))
        return
    from rich.console import Console

    from cabochon.merge.show import swept_table

    Console().print(swept_table(axes, points, best))


def write_plot(path: Path, svg: str) -> None:
    """Put a drawing on the disk. Raises `MissingResource`."""
    from cabochon.base.files import atomic_write

    try:
        with atomic_write(path.expanduser()) as file:
            file.write(svg.encode())
    except OSError as error:
        raise MissingResource(f"{path} was not written", error.strerror or str(error), "choose another place") from None


def _measured(
    work: "Merge",
    axes: "Sequence[Axis]",
    on: Path,
    examples: "Examples",
    tokenizer: "Tokenizer",
    plot: Path | None,
    threads: int,
) -> "list[Point]":
    """All points. What was measured before, and lies beside the plot, is not measured again."""
    import torch

    from cabochon.base.files import sha256
    from cabochon.base.progress import track
    from cabochon.lm import LM
    from cabochon.lm.likelihood import likelihood
    from cabochon.merge.axes import grid
    from cabochon.merge.sweep import append_point, read_points
    from cabochon.merge.sweep import sweep as each

    def evaluate(model: "Gemma2") -> Mapping[str, float]:
        found = likelihood(LM(model, tokenizer), examples.examples, examples.nbytes)
        scores = {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}
        return {"correct": found.greedy / found.examples, **scores} if examples.answers else scores

    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = plot.expanduser().with_name(f"{plot.name}.jsonl") if plot else None
    known = read_points(store) if store else []
    points, before = [], {point.key for point in known}
    with track(len(grid(axes)), "sweeping") as advance:
        for point in each(work, axes, evaluate, measure=sha256(on), known=known, threads=threads, device=device):
            if store and point.key not in before:
                try:
                    append_point(store, point)
                except OSError as error:
                    cause = error.strerror or str(error)
                    raise MissingResource(f"{store} was not written", cause, "choose another place") from None
            points.append(point)
            advance(1)
    return points


def _tokenizer(work: "Merge") -> "Tokenizer":
    """The output's tokenizer, which so far lies in memory."""
    from cabochon.text.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in work.tokenizer.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = load_tokenizer(Path(folder))
    tokenizer.check_fits(work.plan.shape.vocab_size)
    return tokenizer


def _rank(point: "Point") -> tuple[float, float]:
    """Less is better: first more correct answers, then fewer bits."""
    return -point.scores.get("correct", 0.0), point.scores["bits_per_byte"]


def _plain(axes: "Sequence[Axis]", point: "Point") -> dict[str, Any]:
    values = {str(axis): value for axis, value in zip(axes, point.values, strict=True)}
    return values | {name: score if math.isfinite(score) else None for name, score in point.scores.items()}
