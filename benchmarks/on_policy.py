"""A step of on-policy distillation beside TRL's trainers: seconds, and memory above what was there before the first.

    python benchmarks/training.py setup                                  TRL's environment, below runs/peers
    python benchmarks/on_policy.py --rounds 3
    python benchmarks/on_policy.py --candidates cabochon,trl-distillation --new 32 --threads 2

Run it with the environment that has cabochon, on a Linux machine that does nothing else. A student of 4 layers, 256
wide, and a teacher of 512, both random, with the vocabulary of Gemma 2. A step is everything: the student answers 8
prompts of 77 tokens with 128 each, both read them, the Jensen-Shannon divergence goes back, the optimizer changes the
weights. Products are bfloat16, the student's weights float32. Every candidate runs in its own process, in turn. The
last two lines say how fast the answers come in the trainer, and from the bare engine over the same weights.
"""

import json
import random
import sys
from pathlib import Path

from peer_steps import GIB, Result, medians, parser

from cabochon.model.config import Gemma2Config
from cabochon.weights.init import init_folder

STUDENT, TEACHER, VOCAB, LAYERS = 256, 512, 256_000, 4
PROMPTS, DIGITS = 8, 67  # 77 tokens in the chat's format
CANDIDATES = {  # and the environment of each
    "cabochon": None,
    "trl-distillation": "trl",
    "trl-gkd": "trl",
    "rollout": None,
    "engine": None,
}


def prepared(folder: Path, vocab_size: int) -> Path:
    """The folder with `student`, `teacher` and `prompts.jsonl`, made once."""
    for name, size, seed in (("student", STUDENT, 0), ("teacher", TEACHER, 1)):
        config = Gemma2Config(
            vocab_size=vocab_size, hidden_size=size, num_layers=LAYERS, num_heads=size // 64, num_kv_heads=size // 128,
            head_dim=64, intermediate_size=4 * size, query_pre_attn_scalar=64,
        )  # fmt: skip
        if not (folder / name).exists():
            init_folder(config, folder / name, seed=seed)
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices("123456789", k=DIGITS))} for _ in range(PROMPTS * 64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report(middle: dict[str, Result]) -> None:
    """The table, then ratios."""
    print(f"{'':<18}{'seconds':>10}{'before, GiB':>14}{'added, GiB':>12}{'loss':>10}")
    for name, found in middle.items():
        if "loss" in found:
            sizes = f"{found['before'] / GIB:>14.2f}{found['added'] / GIB:>12.2f}"
            print(f"{name:<18}{found['seconds']:>10.2f}{sizes}{found['loss']:>10.4f}")
    for name in ("trl-distillation", "trl-gkd"):
        if {name, "cabochon"} <= set(middle):
            time, memory = (middle[name][key] / middle["cabochon"][key] for key in ("seconds", "added"))
            print(f"{name} / cabochon: {time:.2f} x the time, {memory:.2f} x the memory added")
    for name in ("rollout", "engine"):
        if name in middle:
            print(f"{name}: {middle[name]['tokens_per_second']:.0f} tokens/s")
    if {"rollout", "engine"} <= set(middle):
        share = middle["rollout"]["tokens_per_second"] / middle["engine"]["tokens_per_second"]
        print(f"rollout / engine: {share:.3f}")


def main() -> int:
    """Command line."""
    flags = parser(__doc__, CANDIDATES, steps=2)
    flags.add_argument("--vocab", type=int, default=VOCAB)
    options = flags.parse_args()
    folder = prepared(options.root / f"on-policy-{options.vocab}", options.vocab)
    middle = medians(options, CANDIDATES, "on_policy_worker.py", folder)
    report(middle)
    return 0 if middle else 1


if __name__ == "__main__":
    sys.exit(main())
