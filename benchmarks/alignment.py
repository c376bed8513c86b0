"""Does alignment help? Three studies on sums, with the real commands, from small models that sometimes err.

    python benchmarks/alignment.py --out runs/alignment             three seeds
    python benchmarks/alignment.py --out runs/try --quick           a few steps of each, to see that all of it runs

    distill   a student's own answers graded by the teacher, beside supervised tuning on the teacher's answers
    policy    RLOO on the right result, at a temperature at which the model inside often errs
    warp      two such policies, two iterations, beside one policy for as many steps

The student has a quarter of the size of the model inside, which is its teacher, and has learnt workings of the
miniature corpus for a few steps: additions of up to three digits. All is measured on problems that no model ever saw,
in any wording. Results are kept in OUT/results.json; what is there already is not done again. Tables are printed, plots
are written to OUT.
"""

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from distillation import fresh

from cabochon.base.files import atomic_write
from cabochon.base.plot import Series, line_plot
from cabochon.data.config import DataConfig
from cabochon.data.miniature import arithmetic, jokes
from cabochon.lm import load
from cabochon.model.config import Gemma2Config
from cabochon.recipe.score import replies
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.config import TrainConfig
from cabochon.train.on_policy import prompts_of
from cabochon.train.policy_measure import PolicyMeasure
from cabochon.train.reward_build import open_rewards
from cabochon.train.reward_config import RewardConfig
from cabochon.train.rollout_config import RolloutConfig
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.hub import built_in

STUDENT = replace(Gemma2Config.preset("tiny"), hidden_size=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
                  intermediate_size=256, query_pre_attn_scalar=32)  # fmt: skip
LENGTH, NEW_TOKENS = 384, 160
RATE = 1e-3
TEACHER, START = "the teacher", "the student at first"
OWN, GREEDY, DRAWN = "its own answers, graded by the teacher", "the teacher's likeliest answers", "the teacher's draws"
ROOM = f"--max-new-tokens {NEW_TOKENS} --length {LENGTH}"
CHECKPOINTS = 4
HOT = 1.5  # temperature of policies' answers
POLICY = {"beta": 0.01, "learning_rate": 5e-4, "beta2": 0.95, "prompts_per_step": 8, "samples": 8, "warmup_steps": 2,
          "log_every": 1, "sample_temperature": HOT}  # fmt: skip
INSIDE = "the model inside"
Found = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: steps of each run, and held-out problems."""

    start: int = 250
    distill: int = 120
    policy: int = 20
    warp: int = 40
    problems: int = 200


QUICK = Sizes(start=6, distill=2, policy=CHECKPOINTS, warp=1, problems=8)


def problems(seed: str, count: int, *, held_out: bool = False) -> list[tuple[arithmetic.Problem, int]]:
    """Additions of up to three digits, each asked in one of the corpus' ways."""
    draw = random.Random(seed)
    every = iter(lambda: arithmetic.draw(draw, held_out=held_out), None)
    wanted = (found for found in every if found is not None and found[0].operation == "add")
    return [next(wanted) for _ in range(count)]


def write_lines(path: Path, rows: Iterator[dict[str, object]]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def cabochon(out: Path, *words: object) -> Path:
    """Run a command unless its result is there, which is written to `out`."""
    unfinished = out.with_name(f".{out.name}.unfinished").exists()
    if unfinished or not (out if out.suffix else out / "config.json").exists():
        told = [word for part in words for word in (part.split() if isinstance(part, str) else [str(part)])]
        print("cabochon", shlex.join([*told, "--out", str(out)]), flush=True)
        command = [sys.executable, "-m", "cabochon", *told, "--out", str(out)]
        subprocess.run(command, check=True)
    return out


class Study:
    """Folder, sizes, and what was measured so far."""

    def __init__(self, out: Path, sizes: Sizes) -> None:
        self.out, self.sizes = out, sizes
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "results.json"
        self.found: Found = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.prompts = write_lines(out / "prompts.jsonl", _asked(problems("prompts", 16 * sizes.distill)))
        self.tests = problems("tests", sizes.problems, held_out=True)
        self.held_out = write_lines(out / "held-out.jsonl", _asked(self.tests))

    @cached_property
    def start(self) -> Path:
        """The student that all studies begin with."""
        blank = self.out / "blank"
        if not blank.exists():
            files = {name: (built_in() / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
            save_model(fresh(STUDENT, 0), blank, tokenizer_files=files, dtype=torch.float32)
        drawn = problems("chats", 32 * self.sizes.start)
        chats = (jokes.as_turns([problem.question(way), problem.working()]) for problem, way in drawn)
        data = write_lines(self.out / "chats.jsonl", ({"messages": chat} for chat in chats))
        flags = "--rows 8 --length 256 --optimizer muon --learning-rate 3e-3 --schedule wsd --save-dtype float32"
        return cabochon(self.out / "start", "train sft", blank, "--data", data, flags, "--steps", self.sizes.start)

    def measure(self, name: str, folder: Path, reference: Path, temperature: float = 1.0) -> dict[str, float]:
        """Accuracy of greedy answers, and what `PolicyMeasure` finds in draws: reward, divergence, length."""
        if name not in self.found:
            lm = load(folder, device="cpu", dtype=torch.float32)
            said = replies(lm, [[{"role": "user", "content": p.question(way)}] for p, way in self.tests])
            right = [arithmetic.is_correct(p, reply) for (p, _), reply in zip(self.tests, said, strict=True)]
            self.found[name] = {"accuracy": statistics.fmean(right)} | self._drawn(lm.model, reference, temperature)
            with atomic_write(self._path) as file:
                file.write(json.dumps(self.found, indent=1).encode())
            print(name, self.found[name], flush=True)
        return self.found[name]

    def _drawn(self, model: torch.nn.Module, reference: Path, temperature: float) -> dict[str, float]:
        train = TrainConfig(steps=1, length=LENGTH)
        rollouts = RolloutConfig(max_new_tokens=NEW_TOKENS, sample_temperature=temperature)
        tokenizer = load_tokenizer(built_in())
        prompts = prompts_of(DataConfig(sources=(str(self.held_out),)), tokenizer, train, rollouts)
        with tempfile.TemporaryDirectory() as folder:
            rewards = open_rewards(RewardConfig(reward=("exact",)), Path(folder), "cpu")
            try:
                anchor = load_model(reference, dtype=torch.float32)
                measure = PolicyMeasure(anchor, prompts, rewards, tokenizer, rollouts, train, most_failures=0)
                return measure(model)  # type: ignore[arg-type]
            finally:
                rewards.close()


def _asked(found: list[tuple[arithmetic.Problem, int]]) -> Iterator[dict[str, object]]:
    return ({"prompt": problem.question(way), "answer": problem.result} for problem, way in found)


def distill(study: Study, seeds: list[int]) -> None:
    """On-policy distillation, and supervised tuning on the teacher's answers to the same prompts."""
    out = study.out
    flags = f"{study.start} --learning-rate {RATE} --save-dtype float32 --steps {study.sizes.distill} --seed"
    for seed in seeds:
        for name, temperature in ((GREEDY, 0), (DRAWN, 1)):
            said = cabochon(out / f"said-{temperature}.jsonl", "synthesize", "--data", study.prompts,
                            f"--temperature {temperature} --seed 0 --max-new-tokens {NEW_TOKENS}")  # fmt: skip
            tuned = cabochon(out / f"tuned-{temperature}-{seed}", "train sft", flags, seed, "--data", said,
                             f"--rows 4 --length {LENGTH}")  # fmt: skip
            study.measure(f"{name}, {seed}", tuned, built_in())
        own = cabochon(out / f"own-{seed}", "train distill", flags, seed, "--teacher cabochon/tiny --divergence jsd",
                       "--prompts", study.prompts, ROOM, "--prompts-per-step 16")  # fmt: skip
        study.measure(f"{OWN}, {seed}", own, built_in())


def policy(study: Study, seeds: list[int]) -> None:
    """RLOO on the right result; every checkpoint is measured."""
    steps = study.sizes.policy
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in POLICY.items())
    each = steps // CHECKPOINTS
    study.measure(INSIDE, built_in(), built_in(), HOT)
    for seed in seeds:
        run = cabochon(study.out / f"policy-{seed}", "train policy", built_in(), "--prompts", study.prompts,
                       f"--reward exact --steps {steps} --save-every {each} --keep {CHECKPOINTS} {flags}",
                       ROOM, "--save-dtype float32 --seed", seed)  # fmt: skip
        for step in range(each, steps + 1, each):
            study.measure(f"policy {step}, {seed}", run / "checkpoints" / f"{step:06d}", built_in(), HOT)


def warp(study: Study, seeds: list[int]) -> None:
    """WARP beside one policy for as many steps; its own measurements are kept."""
    settings = POLICY | {"prompts": [str(study.prompts)], "reward": ["exact"], "max_new_tokens": NEW_TOKENS}
    settings |= {"mu": 0.05}  # the paper's 0.01 is for thousands of steps
    for seed in seeds:
        above = {"model": str(built_in()), "iterations": 2, "policies": 2, "steps": study.sizes.warp,
                 "seed": 100 * seed, "held_out": [str(study.held_out)], "held_out_samples": 4}  # fmt: skip
        table = [f"{k} = {json.dumps(v)}" for k, v in above.items()] + ["[policy]"]
        table += [f"{k} = {json.dumps(v)}" for k, v in (settings | {"length": LENGTH}).items()]
        config = study.out / f"warp-{seed}.toml"
        config.write_text("\n".join(table) + "\n")
        out = study.out / f"warp-{seed}"
        if not (out / "front.json").exists():
            print(f"cabochon warp {config} {out} --baseline", flush=True)
            subprocess.run([sys.executable, "-m", "cabochon", "warp", config, out, "--baseline"], check=True)


def told(values: list[float], percent: bool = False) -> str:
    """Mean, spread and the values."""
    spread, times = (statistics.stdev(values) if len(values) > 1 else 0.0), 100 if percent else 1
    form, unit = (".1f", "%") if percent else (".3f", "")
    every = ", ".join(f"{v * times:{form}}" for v in values)
    return f"{statistics.fmean(values) * times:{form}}{unit} ± {spread * times:{form}} ({every})"


def report_measured(study: Study, reference: str, names: list[str], seeds: list[int]) -> None:
    """A row for each name, over seeds."""
    print(f"\n| | greedy answers right | draws right | KL to the {reference}, nats per token | tokens of an answer |")
    print("|---|---|---|---|---|")
    for name in names:
        rows = [row for s in seeds if (row := study.found.get(f"{name}, {s}"))] or [study.found[name]]
        keys = ("accuracy", "reward", "kl_per_token", "length")
        right, drawn, far, long = ([row[key] for row in rows] for key in keys)
        print(f"| {name} | {told(right, True)} | {told(drawn, True)} | {told(far)} | {statistics.fmean(long):.1f} |")


def report_policy(study: Study, seeds: list[int]) -> None:
    """Accuracy over the divergence from the start, of each seed."""
    steps = range(study.sizes.policy // CHECKPOINTS, study.sizes.policy + 1, study.sizes.policy // CHECKPOINTS)
    series = []
    for seed in seeds:
        points = [(0.0, study.found[INSIDE]["reward"], "step 0")]
        rows = [(step, study.found[f"policy {step}, {seed}"]) for step in steps]
        points += [(row["kl"], row["reward"], f"step {step}") for step, row in rows]
        series.append(Series(f"seed {seed}", points))
    plot(study.out / "alignment-policy.svg", series, "Policy optimisation on the right result", "right draws")


def plot(path: Path, series: list[Series], title: str, y_label: str) -> None:
    """An SVG over the divergence from the start."""
    x_label = "KL divergence from the start, nats per answer"
    path.write_text(line_plot(series, title=title, x_label=x_label, y_label=y_label), encoding="utf-8")


def at(points: list[tuple[float, float]], kl: float) -> float | None:
    """The reward at a divergence, on the line through measured points; None beyond them."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= kl <= x1:
            return y0 + (y1 - y0) * (kl - x0) / (x1 - x0) if x1 > x0 else y1
    return None


def report_warp(study: Study, seeds: list[int]) -> None:
    """Rewards of both fronts at equal divergence, at the plain run's checkpoints."""
    print("\n| seed | plain, step | KL, nats per answer | plain | WARP | difference |\n|---|---|---|---|---|---|")
    every: dict[str, list[list[tuple[float, float]]]] = {"warp": [], "plain": []}
    for seed in seeds:
        rows = json.loads((study.out / f"warp-{seed}" / "front.json").read_text())["points"]
        fronts = {run: [(r["kl"], r["reward"]) for r in rows if r["run"] == run] for run in ("warp", "plain")}
        for row in rows:
            if row["run"] == "plain":
                other = at(fronts["warp"], row["kl"])
                shown = "beyond its front | " if other is None else f"{other:.3f} | {other - row['reward']:+.3f}"
                print(f"| {seed} | {row['step']:g} | {row['kl']:.2f} | {row['reward']:.3f} | {shown} |")
        for run, front in fronts.items():
            every[run].append(front)
        best = {run: max(front, key=lambda p: p[1]) for run, front in fronts.items()}
        print(f"seed {seed}, highest: {best}")
    names = {"warp": "WARP, shares of the last merge", "plain": "one policy, a fifth of the steps further each"}
    series = [
        Series(name, [(*mean(points), "") for points in zip(*every[run], strict=True)]) for run, name in names.items()
    ]
    plot(study.out / "alignment-warp.svg", series, f"Means over {len(seeds)} seeds of as many steps", "right draws")


def mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The point in the middle of several."""
    x, y = zip(*points, strict=True)
    return statistics.fmean(x), statistics.fmean(y)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--studies", nargs="+", choices=("distill", "policy", "warp"))
    parser.add_argument("--quick", action="store_true", help="a few steps of each, which tell nothing")
    options = parser.parse_args()
    seeds, studies = list(range(1, options.seeds + 1)), options.studies or ("distill", "policy", "warp")
    study = Study(options.out, QUICK if options.quick else Sizes())
    if "distill" in studies:
        study.measure(TEACHER, built_in(), built_in())
        study.measure(START, study.start, built_in())
        distill(study, seeds)
        report_measured(study, "teacher", [TEACHER, START, GREEDY, DRAWN, OWN], seeds)
    if "policy" in studies:
        policy(study, seeds)
        report_measured(study, "start", [INSIDE, f"policy {study.sizes.policy}"], seeds)
        report_policy(study, seeds)
    if "warp" in studies:
        warp(study, seeds)
        report_warp(study, seeds)


if __name__ == "__main__":
    main()
