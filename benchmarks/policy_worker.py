"""Steps of policy optimisation, measured in a process of their own: `policy_worker.py CANDIDATE FOLDER STEPS THREADS
NEW`. Only the candidate's library is imported. The answer is one line of JSON, the last that is printed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from on_policy_worker import Result, Watch, trained

PROMPTS, SAMPLES, RATE, BETA = 16, 4, 1e-6, 0.05


def cabochon(folder: Path, steps: int, new: int, estimator: Any) -> Result:
    """Stream and trainer as `cabochon train policy` has them."""
    from cabochon.base.machine import keep_freed_memory
    from cabochon.data.config import DataConfig
    from cabochon.train.build import Settings, build
    from cabochon.train.on_policy import OnPolicy
    from cabochon.train.policy_config import GroupConfig, PolicyConfig
    from cabochon.train.reward_config import RewardConfig

    keep_freed_memory()
    prompts = DataConfig(sources=(str(folder / "prompts.jsonl"),))
    settings = Settings(
        model=folder / "model",
        name="model",
        out=folder / "out",
        train=PolicyConfig(
            steps=steps + 1, length=256, learning_rate=RATE, warmup_steps=0, estimator=estimator, beta=BETA
        ),
        data=prompts,
        on_policy=OnPolicy(
            prompts=prompts,
            rollouts=GroupConfig(prompts_per_step=PROMPTS, samples=SAMPLES, max_new_tokens=new),
        ),
        rewards=RewardConfig(reward=("exact",)),
    )
    run, watch, lengths = build(settings), Watch(), []
    watch.begin()
    for _ in range(steps + 1):
        report = run.trainer.step(next(run.stream))
        watch.step()
        lengths.append(report.measures["length"])
    return watch.result(report.loss) | {"length": sum(lengths[1:]) / steps}


def trl(folder: Path, steps: int, new: int, estimator: str) -> Result:
    """RLOOTrainer or GRPOTrainer, with the same reward."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        attn_implementation="eager",  # the one that has the soft cap
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    data = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows],
        "answer": [row["answer"] for row in rows],
    })  # fmt: skip
    kinds: Any = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    config, trainer = kinds[estimator]
    told = config(
        output_dir=str(folder / "trl"), max_steps=steps + 1, per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES, max_completion_length=new, learning_rate=RATE, beta=BETA, temperature=1.0, bf16=True,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    made = trainer(model, reward_funcs=_exact, args=told, train_dataset=data, processing_class=tokenizer)
    found = trained(made)
    lengths = [one["completions/mean_length"] for one in made.state.log_history if "completions/mean_length" in one]
    return found | {"length": sum(lengths[1:]) / max(1, len(lengths[1:]))}


def _exact(completions: Any, answer: Any, **_: Any) -> list[float]:
    numbers = [re.findall(r"-?\d+", one[0]["content"]) for one in completions]
    return [float(bool(n) and n[-1] == wanted) for n, wanted in zip(numbers, answer, strict=True)]


def main(name: str, folder: str, steps: str, threads: str, new: str) -> None:
    """Print what a candidate took."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    library, _, estimator = name.partition("-")
    candidate = {"cabochon": cabochon, "trl": trl}[library]
    print(json.dumps(candidate(Path(folder), int(steps), int(new), estimator)))


if __name__ == "__main__":
    main(*sys.argv[1:])
