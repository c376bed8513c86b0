"""Does a teacher help? A student trained from scratch beside the same student taught by a model four times its size.

    python benchmarks/distillation.py --out runs/distillation             half an hour on two cores

All learn from the miniature corpus, most of it the running Python's standard library. Student and taught student see
the same tokens in the same order; only the loss differs. Written are the held-out loss over the steps for each seed as
JSON, a table with mean and spread, and the curve as SVG. A model that is there is not trained again.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cabochon.base.machine import keep_freed_memory
from cabochon.base.plot import Series, line_plot
from cabochon.data import miniature
from cabochon.data.config import DataConfig
from cabochon.data.pack import Batch
from cabochon.data.stream import open_eval, open_stream
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.config import TrainConfig
from cabochon.train.distill_config import DistillConfig
from cabochon.train.loop import Hooks, evaluate, train_steps
from cabochon.train.objectives import live_teacher, next_tokens
from cabochon.train.step import Objective, Trainer
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.hub import built_in

DOCUMENTS, HELD_OUT = 12_000, 0.03
LENGTH, ROWS = 256, 16
POINTS = 10  # evaluations of a run
TINY = Gemma2Config.preset("tiny")
STUDENT = replace(TINY, hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=32, intermediate_size=256,
                  query_pre_attn_scalar=32)  # fmt: skip
TEACHER = replace(STUDENT, hidden_size=176, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=512)

Curve = list[tuple[int, float]]


def corpus(folder: Path) -> Path:
    """The texts as JSONL, made once."""
    path = folder / "texts.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = itertools.islice(miniature.pretraining_documents(1), DOCUMENTS)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fresh(config: Gemma2Config, seed: int) -> Gemma2:
    """A model with seeded weights; norms start at a factor of one."""
    torch.manual_seed(seed)
    model = Gemma2(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02 if name == "embedding.weight" else p.shape[1] ** -0.5)
    return model


def learn(model: Gemma2, objective: Objective, texts: DataConfig, tokenizer: Tokenizer, config: TrainConfig) -> Curve:
    """Train in place; the held-out loss at evenly spaced steps."""
    curve: Curve = []

    def held_out() -> Iterator[Batch]:
        stream = open_eval(texts, tokenizer, rows=ROWS, length=LENGTH)
        assert stream is not None
        return stream

    def look(step: int) -> bool:
        found = evaluate(model, held_out(), config)
        assert found is not None
        curve.append((step, found["loss"]))
        print(f"  step {step:>5}: {curve[-1][1]:.4f}", flush=True)
        return True

    with open_stream(texts, tokenizer, rows=ROWS, length=LENGTH) as stream:
        train_steps(Trainer(model, config, objective), stream, Hooks(evaluate=look))
    return curve


def run(out: Path, steps: int, teacher_steps: int, seeds: list[int]) -> dict[str, list[Curve]]:
    """Everything; what is there already is read."""
    tokenizer, texts = load_tokenizer(built_in()), DataConfig(sources=(str(corpus(out)),), held_out=HELD_OUT)
    folder = out / "teacher"
    if not folder.exists():
        print(f"teacher, {TEACHER.num_parameters:,} parameters, {teacher_steps} steps")
        config = TrainConfig(steps=teacher_steps, rows=ROWS, length=LENGTH, eval_every=teacher_steps // POINTS)
        teacher = fresh(TEACHER, 0)
        curve = learn(teacher, next_tokens(config), texts, tokenizer, config)
        save_model(teacher, folder, dtype=torch.float32)
        (out / "teacher.json").write_text(json.dumps(curve))
    teacher = load_model(folder, dtype=torch.float32)
    found: dict[str, list[Curve]] = {"from scratch": [], "from the teacher": []}
    for seed, name in itertools.product(seeds, found):
        path = out / f"{name.replace(' ', '-')}-{seed}.json"
        if not path.exists():
            print(f"student {name}, {STUDENT.num_parameters:,} parameters, seed {seed}")
            config = TrainConfig(steps=steps, rows=ROWS, length=LENGTH, eval_every=steps // POINTS, seed=seed)
            taught = name == "from the teacher"
            objective = live_teacher(DistillConfig(), teacher) if taught else next_tokens(config)
            curve = learn(fresh(STUDENT, seed), objective, replace(texts, seed=seed), tokenizer, config)
            path.write_text(json.dumps(curve))
        found[name].append(json.loads(path.read_text()))
    return found


def report(out: Path, found: dict[str, list[Curve]]) -> None:
    """The table, and the curve of the means."""
    teacher = json.loads((out / "teacher.json").read_text())
    print(f"held-out loss in nats per token; perplexity. Teacher: {teacher[-1][1]:.3f}")
    series = []
    for name, curves in found.items():
        ends = [curve[-1][1] for curve in curves]
        spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
        mean = statistics.mean(ends)
        print(f"{name:<18} {mean:.4f} +- {spread:.4f}  perplexity {torch.tensor(mean).exp():.2f}  {ends}")
        steps = [step for step, _ in curves[0]]
        means = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        series.append(Series(name, [(s, m, f"{m:.3f}") for s, m in zip(steps, means, strict=True)]))
    svg = line_plot(series, title="A student with and without a teacher", x_label="steps", y_label="held-out loss")
    (out / "distillation.svg").write_text(svg, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    report(options.out, run(options.out, options.steps, options.teacher_steps, list(range(1, options.seeds + 1))))


if __name__ == "__main__":
    main()
