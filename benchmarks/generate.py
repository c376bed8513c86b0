"""Prefill and decode of the plain loop beside transformers on the same folder, alternating, on a quiet machine.

    cabochon init --preset 2b --out runs/2b
    python benchmarks/generate.py runs/2b --prompt 512 --new 16 --rounds 3

Prints tokens per second of both, their ratio, and the floor: each decoded token reads every weight once.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cabochon
from cabochon.base.machine import inspect
from cabochon.generate.plain import PlainLoop
from cabochon.generate.sampling import SamplingParams

Timing = tuple[float, float]  # seconds to the first token, seconds for each further one


def ours(folder: Path) -> Callable[[list[int], int], Timing]:
    """A function that answers a prompt with our loop and says how long it took."""
    model = cabochon.load(folder, dtype="bfloat16", device="cpu").model

    def run(ids: list[int], new: int) -> Timing:
        started = time.perf_counter()
        loop = PlainLoop(model, [ids], [SamplingParams(max_new_tokens=new)], frozenset())
        loop.step()
        first = time.perf_counter()
        for _ in range(new - 1):
            loop.step()
        return first - started, (time.perf_counter() - first) / (new - 1)

    return run


def theirs(folder: Path) -> Callable[[list[int], int], Timing]:
    """The same with transformers, whose eager attention is the one that has the soft cap."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")

    def generate(ids: torch.Tensor, new: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    def run(ids: list[int], new: int) -> Timing:
        prompt = torch.tensor([ids])
        first = generate(prompt, 1)
        return first, (generate(prompt, new) - first) / (new - 1)

    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    machine = inspect()
    runners = {"cabochon": ours(options.folder), "transformers": theirs(options.folder)}
    ids = torch.randint(200, 4000, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    for run in runners.values():
        run(ids[:8], 2)  # the first pass over the weights brings them into memory
    for _ in range(options.rounds):
        for name, run in runners.items():
            timings[name].append(run(ids, options.new))
    speeds = {}
    for name, rounds in timings.items():
        speeds[name] = options.prompt / median(t[0] for t in rounds), 1 / median(t[1] for t in rounds)
        print(f"{name:<13} prefill {speeds[name][0]:8.1f} tokens/s   decode {speeds[name][1]:6.2f} tokens/s")
    (a, b), (c, d) = speeds["cabochon"], speeds["transformers"]
    print(f"{'ratio':<13} prefill {a / c:8.2f} x          decode {b / d:6.2f} x")
    weights = 2 * cabochon.load(options.folder, dtype="bfloat16", device="cpu").config.num_parameters
    print(f"floor: {machine.read_bandwidth / weights:.2f} decoded tokens/s at {machine.read_bandwidth / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
