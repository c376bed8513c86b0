"""Steps of on-policy distillation, measured in a process of their own: `on_policy_worker.py CANDIDATE FOLDER STEPS
THREADS NEW`. Only the candidate's library is imported. The answer is one line of JSON, the last that is printed.

The first step counts only for memory: it brings code and shapes into memory, as every first step does.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPTS, BETA, RATE = 8, 0.5, 1e-5

Result = dict[str, float]


def status(key: str) -> int:
    """A size of this process in bytes, from the system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Watch:
    """Times of steps, and the most memory above what was there when the first began."""

    def begin(self) -> None:
        """Everything is loaded."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.before, self.times = status("VmRSS"), []
        self.started = time.perf_counter()

    def step(self) -> None:
        """One more is done."""
        now = time.perf_counter()
        self.times.append(now - self.started)
        self.started = now

    def result(self, loss: float) -> Result:
        """What is answered."""
        added = status("VmHWM") - self.before
        return {"seconds": min(self.times[1:]), "before": self.before, "added": added, "loss": loss}


# Ours


def settings(folder: Path, steps: int, new: int) -> Any:
    """What `cabochon train distill --prompts` makes of its flags."""
    from cabochon.data.config import DataConfig
    from cabochon.train.build import Settings
    from cabochon.train.config import TuneConfig
    from cabochon.train.distill_config import DistillConfig
    from cabochon.train.on_policy import OnPolicy
    from cabochon.train.rollout_config import RolloutConfig
    from cabochon.train.teaching import TaughtBy

    prompts = DataConfig(sources=(str(folder / "prompts.jsonl"),))
    return Settings(
        model=folder / "student",
        name="student",
        out=folder / "out",
        train=TuneConfig(steps=steps, learning_rate=RATE, warmup_steps=0),
        data=prompts,
        teachers=(TaughtBy(folder / "teacher", "teacher"),),
        distill=DistillConfig(divergence="jsd", beta=BETA),
        on_policy=OnPolicy(prompts=prompts, rollouts=RolloutConfig(prompts_per_step=PROMPTS, max_new_tokens=new)),
    )


def cabochon(folder: Path, steps: int, new: int) -> Result:
    """Stream and trainer as a run has them."""
    from cabochon.base.machine import keep_freed_memory
    from cabochon.train.build import build

    keep_freed_memory()
    run, watch, loss = build(settings(folder, steps + 1, new)), Watch(), 0.0
    watch.begin()
    for _ in range(steps + 1):
        loss = run.trainer.step(next(run.stream)).loss
        watch.step()
    return watch.result(loss)


def rollout(folder: Path, steps: int, new: int) -> Result:
    """Answers in the trainer, weights taken each time, log-probabilities noted."""
    from cabochon.train.build import build

    stream: Any = build(settings(folder, steps + 1, new)).stream
    stream.rollouts()
    rates = []
    for _ in range(steps):
        started = time.perf_counter()
        tokens = sum(len(one.answer.ids) for one in stream.rollouts())
        rates.append(tokens / (time.perf_counter() - started))
    return {"tokens_per_second": max(rates)}


def engine(folder: Path, steps: int, new: int) -> Result:
    """The same prompts, answered by the engine over weights that were loaded in bfloat16."""
    from cabochon.data.prompts import open_prompts
    from cabochon.generate.engine import Engine
    from cabochon.generate.sampling import SamplingParams
    from cabochon.text.tokenizer import load_tokenizer
    from cabochon.weights.folder import load_model

    bare = Engine(load_model(folder / "student", weights="bf16"), frozenset())
    prompts = open_prompts([str(folder / "prompts.jsonl")], load_tokenizer(folder / "student"), longest=1000)
    rates = []
    for step in range(steps + 1):
        started = time.perf_counter()
        for number in range(PROMPTS):
            params = SamplingParams(max_new_tokens=new, temperature=1.0, seed=number)
            bare.submit(prompts[step * PROMPTS + number].ids, params)
        while not bare.idle:
            bare.step()
        rates.append(PROMPTS * new / (time.perf_counter() - started))
    return {"tokens_per_second": max(rates[1:])}


# Theirs


def loaded(folder: Path) -> tuple[Any, Any, Any, list[str]]:
    """Student in float32, teacher in bfloat16, the tokenizer and the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {"attn_implementation": "eager"}  # the one that has the soft cap
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32, **more)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    rows = (folder / "prompts.jsonl").read_text().splitlines()
    return student, teacher, tokenizer, [json.loads(row)["prompt"] for row in rows]


def trained(trainer: Any) -> Result:
    """Train, with a watch on it."""
    from transformers import TrainerCallback

    watch = Watch()

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    trainer.add_callback(Callback())
    return watch.result(trainer.train().training_loss)


def usual(steps: int) -> dict[str, Any]:
    """What both trainers are told."""
    return dict(
        output_dir=tempfile.mkdtemp(), max_steps=steps + 1, per_device_train_batch_size=PROMPTS, learning_rate=RATE,
        gradient_checkpointing=False, bf16=True, use_cpu=True, temperature=1.0, beta=BETA, save_strategy="no",
        report_to="none", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def trl_gkd(folder: Path, steps: int, new: int) -> Result:
    """GKDTrainer, every batch written by the student."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer, prompts = loaded(folder)
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": "1"}] for p in prompts]
    config = GKDConfig(**usual(steps), lmbda=1.0, max_new_tokens=new, max_length=1024)
    data = Dataset.from_dict({"messages": turns})
    trainer = GKDTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    return trained(trainer)


def trl_distillation(folder: Path, steps: int, new: int) -> Result:
    """DistillationTrainer, whose loss walks over chunks."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer, prompts = loaded(folder)
    config = DistillationConfig(**usual(steps), max_completion_length=new)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in prompts]})
    trainer = DistillationTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    return trained(trainer)


CANDIDATES = {
    "cabochon": cabochon,
    "rollout": rollout,
    "engine": engine,
    "trl-gkd": trl_gkd,
    "trl-distillation": trl_distillation,
}


def main(name: str, folder: str, steps: str, threads: str, new: str) -> None:
    """Print what a candidate took."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    print(json.dumps(CANDIDATES[name](Path(folder), int(steps), int(new))))


if __name__ == "__main__":
    main(*sys.argv[1:])
