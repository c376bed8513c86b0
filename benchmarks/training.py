"""A training step beside transformers, and a distillation step beside TRL: time, and memory above the model's own.

    python benchmarks/training.py setup                                TRL's environment, below runs/peers
    python benchmarks/training.py run --rounds 3
    python benchmarks/training.py run --pairs train,mixed --threads 2

Run it with the environment that has cabochon and, for development, transformers, on a Linux machine that does nothing
else. Random models of 4 layers with the vocabulary of Gemma 2. Every candidate runs in its own process, ours and
theirs in turn. A step is forward and backward; the optimizer is not part of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import peer_setup
from peer_report import physical_cores, processor

GIB = 2**30
TRL = peer_setup.Environment((peer_setup.TORCH, (*peer_setup.TORCH, "transformers==5.24.0", "trl==1.16.0")))
PAIRS = {  # what is compared: ours, theirs, the environment of theirs
    "train": ("cabochon", "transformers", None),
    "mixed": ("cabochon-mixed", "transformers-mixed", None),
    "distill": ("cabochon-distill", "trl-distill", "trl"),
}

Result = dict[str, float]


def measure(python: Path, candidate: str, steps: int, threads: int, device: str) -> Result:
    """What a worker answers. Raises `RuntimeError` with its last words."""
    command = [str(python), str(peer_setup.HERE / "training_worker.py"), candidate, str(steps), str(threads), device]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"{candidate} ended with {done.returncode}")
    answer: Result = json.loads(done.stdout.strip().rpartition("\n")[2])
    return answer


def run(pairs: list[str], options: argparse.Namespace) -> dict[str, list[Result]]:
    """Results of every candidate, round by round; one that cannot run is left out, and said so."""
    results: dict[str, list[Result]] = {}
    for number in range(options.rounds):
        for ours, theirs, environment in (PAIRS[pair] for pair in pairs):
            for candidate, env in ((ours, None), (theirs, environment)):
                print(f"round {number + 1}: {candidate}", file=sys.stderr)
                try:
                    python = peer_setup.python_of(options.root, env)
                    answer = measure(python, candidate, options.steps, options.threads, options.device)
                    results.setdefault(candidate, []).append(answer)
                except (RuntimeError, FileNotFoundError) as error:
                    print(f"  left out: {error}", file=sys.stderr)
    return results


def middle(rounds: list[Result], key: str) -> float:
    """The median of one quantity."""
    return statistics.median(result[key] for result in rounds)


def report(pairs: list[str], results: dict[str, list[Result]], options: argparse.Namespace) -> None:
    """The table, then ratios, theirs to ours."""
    print(f"{processor()}, {options.threads} threads; medians of {options.rounds} rounds, each a new process")
    print(f"{'':<22}{'seconds':>10}{'GiB':>10}{'loss':>10}")
    for name, rounds in results.items():
        print(
            f"{name:<22}{middle(rounds, 'seconds'):>10.2f}{middle(rounds, 'bytes') / GIB:>10.2f}"
            f"{middle(rounds, 'loss'):>10.4f}"
        )
    for ours, theirs, _ in (PAIRS[pair] for pair in pairs):
        if ours in results and theirs in results:
            times, sizes = (middle(results[theirs], key) / middle(results[ours], key) for key in ("seconds", "bytes"))
            print(f"{theirs} / {ours}: {times:.2f} x the time, {sizes:.1f} x the memory")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["setup", "run"])
    parser.add_argument("--pairs", default=",".join(PAIRS), help=f"of {','.join(PAIRS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each process; the fastest counts")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: wider models, longer rows")
    parser.add_argument("--root", type=Path, default=peer_setup.HERE.parent / "runs" / "peers")
    options = parser.parse_args()
    pairs = options.pairs.split(",")
    if unknown := [pair for pair in pairs if pair not in PAIRS]:
        parser.error(f"no pair named {', '.join(unknown)}")
    if options.verb == "setup":
        peer_setup.ENVIRONMENTS["trl"] = TRL
        return 0 if peer_setup.environment(options.root, "trl") else 1
    results = run(pairs, options)
    report(pairs, results, options)
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
