"""The front of WARP: reward over KL for shares of the last merge beside the start, and of a plain run for comparison.

Shares are linear interpolation towards initialisation (arXiv 2406.16768, section 3.3 and figure 1): one training gives
all of them. Each point is measured once and kept as a line of OUT/front.jsonl.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cabochon.base.files import atomic_write
from cabochon.base.plot import Series, line_plot
from cabochon.merge.axes import Axis
from cabochon.merge.sweep import Evaluate, Point, append_point, read_points, sweep
from cabochon.recipe.warp import Policy, prepared
from cabochon.weights.folder import load_model

if TYPE_CHECKING:
    from rich.table import Table

POINTS, SUMMARY, PLOT = "front.jsonl", "front.json", "front.svg"
WARP, PLAIN = "warp", "plain"


@dataclass(frozen=True)
class Measured:
    """A point: of which run, its eta or the steps done, and what `PolicyMeasure` found."""

    run: str
    at: float
    scores: Mapping[str, float]

    def worth(self, beta: float) -> float:
        """Reward minus what its distance costs."""
        return self.scores["reward"] - beta * self.scores["kl"]


def measured_shares(
    start: Path, slerp: Path, etas: Sequence[float], evaluate: Evaluate, *, word: str, out: Path, device: str = "cpu"
) -> Iterator[Measured]:
    """Points of WARP, in the order of their shares.

    Args:
        start: the model folder where all began.
        slerp: the last merge.
        etas: shares of it.
        evaluate: called with each model.
        word: what the scores depend on beside the model.
        out: the folder that keeps what was measured.
        device: where models are measured.
    """
    known, work = read_points(out / POINTS), prepared("liti", start, [slerp], {"eta": 1.0})
    before = {point.key for point in known}
    for point in sweep(work, [Axis("eta", tuple(sorted(etas)))], evaluate, measure=word, known=known, device=device):
        if point.key not in before:
            append_point(out / POINTS, point)
        yield Measured(WARP, point.values[0], point.scores)


def measured_run(
    policy: Policy, evaluate: Evaluate, *, word: str, out: Path, device: str = "cpu"
) -> Iterator[Measured]:
    """Points of a plain run: its checkpoints."""
    known = {point.key: point for point in read_points(out / POINTS)}
    for folder in sorted((policy.out / "checkpoints").iterdir(), key=lambda folder: folder.name):
        if not folder.name.isdecimal():
            continue
        key = f"{PLAIN}-{folder.name}-{word}"
        if key not in known:
            model = load_model(folder, dtype=torch.float32, device=device)
            known[key] = Point((float(folder.name),), evaluate(model), key)
            append_point(out / POINTS, known[key])
        yield Measured(PLAIN, known[key].values[0], known[key].scores)


def best_share(points: Sequence[Measured], beta: float) -> float:
    """The share of WARP's that is worth most; of equal ones the smallest."""
    return max((point for point in points if point.run == WARP), key=lambda point: point.worth(beta)).at


def write_front(out: Path, points: Sequence[Measured], beta: float, best: float) -> None:
    """Write SUMMARY and PLOT. Raises `OSError`."""
    with atomic_write(out / SUMMARY) as file:
        file.write(json.dumps(summary(points, beta, best), indent=1).encode())
    with atomic_write(out / PLOT) as file:
        file.write(_plot(points).encode())


def summary(points: Sequence[Measured], beta: float, best: float) -> dict[str, Any]:
    """What can be said of the points as plain values."""
    rows = [{"run": point.run, _axis(point): point.at, **point.scores, "worth": point.worth(beta)} for point in points]
    return {"beta": beta, "eta": best, "points": rows}


def front_table(points: Sequence[Measured], beta: float, best: float) -> "Table":
    """A rich table with a row for each point, and a mark at the best. It fits a terminal of 80 columns."""
    from rich.table import Table

    made = Table(caption=f"KL in nats per answer; worth: reward - {beta:g} KL", caption_justify="left")
    for name in ("run", "eta / step", "reward", "KL", "length", "worth", ""):
        made.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for point in points:
        scores, chosen = point.scores, point.run == WARP and point.at == best
        made.add_row(
            point.run,
            f"{point.at:g}",
            f"{scores['reward']:.4f} ± {scores['reward_error']:.4f}",
            f"{scores['kl']:.3f}",
            f"{scores['length']:.1f}",
            f"{point.worth(beta):.4f}",
            "best" if chosen else "",
        )
    return made


def _axis(point: Measured) -> str:
    return "eta" if point.run == WARP else "step"


def _plot(points: Sequence[Measured]) -> str:
    names = {WARP: "WARP, shares of the last merge", PLAIN: "one policy, as many steps"}
    series = [
        Series(name, [(p.scores["kl"], p.scores["reward"], f"{_axis(p)} {p.at:g}") for p in points if p.run == run])
        for run, name in names.items()
    ]
    return line_plot(
        [one for one in series if one.points],
        title="Reward over the distance from the start",
        x_label="KL divergence from the start, nats per answer",
        y_label="reward on held-out prompts",
    )
