"""What benchmarks of training steps beside TRL share: flags, workers in turn, medians."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import peer_setup
from peer_report import physical_cores, processor

GIB = 2**30
Result = dict[str, float]


def parser(doc: str | None, candidates: Mapping[str, str | None], steps: int) -> argparse.ArgumentParser:
    """The flags of all of them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--candidates", default=",".join(candidates), help=f"of {','.join(candidates)}")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=steps, help="of each process, after one more; the fastest counts")
    made.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    made.add_argument("--threads", type=int, default=physical_cores())
    made.add_argument("--root", type=Path, default=peer_setup.HERE.parent / "runs" / "peers")
    return made


def medians(
    options: argparse.Namespace, candidates: Mapping[str, str | None], worker: str, folder: Path
) -> dict[str, Result]:
    """Every candidate's figures over the rounds; those that fail are left out, with their last words.

    Args:
        candidates: and the environment of each; None: the one that runs this.
        worker: a program beside this one, called with candidate, folder, steps, threads and tokens of an answer.
    """
    chosen = options.candidates.split(",")
    if unknown := [name for name in chosen if name not in candidates]:
        raise SystemExit(f"no candidate named {', '.join(unknown)}; there are {', '.join(candidates)}")
    results: dict[str, list[Result]] = {}
    for number in range(options.rounds):
        for candidate in chosen:
            print(f"round {number + 1}: {candidate}", file=sys.stderr)
            python = peer_setup.python_of(options.root, candidates[candidate])
            arguments = map(str, (candidate, folder, options.steps, options.threads, options.new))
            try:
                found = _measure([str(python), str(peer_setup.HERE / worker), *arguments], options.threads)
            except (RuntimeError, FileNotFoundError) as error:
                print(f"  left out: {error}", file=sys.stderr)
            else:
                results.setdefault(candidate, []).append(found)
    print(f"{processor()}, {options.threads} threads; medians of {options.rounds} rounds, each a new process")
    return {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }


def _measure(command: list[str], threads: int) -> Result:
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **quiet}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}")
    answer: Result = json.loads(done.stdout.strip().rpartition("\n")[2])
    return answer
