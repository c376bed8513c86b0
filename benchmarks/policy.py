"""A step of RLOO and of GRPO on the model that ships inside, beside TRL's trainers: seconds, and memory added.

    python benchmarks/training.py setup                                  TRL's environment, below runs/peers
    python benchmarks/policy.py --rounds 3
    python benchmarks/policy.py --candidates cabochon-rloo,trl-rloo --steps 1

Run it with the environment that has cabochon, on a Linux machine that does nothing else. A step is everything: 4
answers to each of 16 sums, a reward for the right number, the divergence from a frozen copy, the gradient, the
optimizer. Products are bfloat16, weights float32. Every candidate runs in its own process, in turn.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from peer_steps import GIB, Result, medians, parser

from cabochon.data.miniature import arithmetic
from cabochon.weights.hub import built_in

CANDIDATES = {"cabochon-rloo": None, "trl-rloo": "trl", "cabochon-grpo": None, "trl-grpo": "trl"}


def prepared(folder: Path) -> Path:
    """The folder with `model` and `prompts.jsonl`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built_in(), folder / "model")
    draw = random.Random(0)
    asked = [arithmetic.draw(draw) for _ in range(512)]
    rows = [{"prompt": problem.question(way), "answer": str(problem.result)} for problem, way in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report(middle: dict[str, Result]) -> None:
    """The table, then ratios."""
    print(f"{'':<15}{'seconds':>10}{'before, GiB':>14}{'added, GiB':>12}{'tokens an answer':>19}")
    for name, found in middle.items():
        sizes = f"{found['before'] / GIB:>14.2f}{found['added'] / GIB:>12.2f}"
        print(f"{name:<15}{found['seconds']:>10.2f}{sizes}{found['length']:>19.1f}")
    for kind in ("rloo", "grpo"):
        if {f"trl-{kind}", f"cabochon-{kind}"} <= set(middle):
            theirs, ours = middle[f"trl-{kind}"], middle[f"cabochon-{kind}"]
            print(f"trl / cabochon, {kind}: {theirs['seconds'] / ours['seconds']:.2f} x the time")


def main() -> int:
    """Command line."""
    options = parser(__doc__, CANDIDATES, steps=3).parse_args()
    middle = medians(options, CANDIDATES, "policy_worker.py", prepared(options.root / "policy"))
    report(middle)
    return 0 if middle else 1


if __name__ == "__main__":
    sys.exit(main())
