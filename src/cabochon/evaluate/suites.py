"""Named sets of tasks, and what others have published for them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cabochon.model.config import PRESETS, Gemma2Config


@dataclass(frozen=True)
class Entry:
    """A task or a group of the harness, as a suite runs it.

    Attributes:
        label: what tables call it.
        shots: examples before each item; None: as the task says.
        metric: the one that counts, with its filter.
    """

    task: str
    label: str
    metric: str
    shots: int | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks, and published scores: by what published them, by label, in percent."""

    entries: tuple[Entry, ...]
    published: Mapping[str, Mapping[str, float]]
    chat: bool = False  # whether its questions are asked in Gemma's chat format unless told otherwise


_REPORT = ("MMLU", "GSM8K", "ARC-c", "HellaSwag", "Winogrande")


def _row(*scores: float) -> dict[str, float]:
    return dict(zip(_REPORT, scores, strict=True))


# Gemma 2: the report (arXiv 2408.00118) and the announcement of June 2024, which differ in GSM8K; the others
# as the announcement prints them.
_PUBLISHED = {
    "Gemma 2 2b, report": _row(52.2, 24.3, 55.7, 72.9, 71.3),
    "Gemma 2 9b, report": _row(71.3, 68.6, 68.4, 81.9, 80.6),
    "Gemma 2 9b, announcement": _row(71.3, 62.3, 68.4, 81.9, 80.6),
    "Gemma 2 27b, report": _row(75.2, 74.0, 71.4, 86.4, 83.7),
    "Gemma 2 27b, announcement": _row(75.2, 75.1, 71.4, 86.4, 83.7),
    "Mistral 7b": _row(62.5, 34.5, 60.5, 83.0, 78.5),
    "Llama 3 8b": _row(66.6, 45.7, 59.2, 82.0, 78.5),
    "Gemma 1 7b": _row(64.4, 50.9, 61.1, 82.3, 79.0),
    "Llama 3 70b": _row(79.2, 76.9, 68.8, 88.0, 85.3),
    "Qwen 1.5 32b": _row(74.3, 61.1, 63.6, 85.0, 81.5),
}
_BESIDE = {"2b": (), "9b": ("Mistral 7b", "Llama 3 8b", "Gemma 1 7b"), "27b": ("Llama 3 70b", "Qwen 1.5 32b")}

SUITES = {
    # As the first Open LLM Leaderboard ran them; GSM8K greedily, one answer each (maj@1).
    "gemma2-report": Suite(
        (
            Entry("mmlu", "MMLU", "acc,none", 5),
            Entry("gsm8k", "GSM8K", "exact_match,strict-match", 5),
            Entry("arc_challenge", "ARC-c", "acc_norm,none", 25),
            Entry("hellaswag", "HellaSwag", "acc_norm,none", 10),
            Entry("winogrande", "Winogrande", "acc,none", 5),
        ),
        _PUBLISHED,
    ),
    "leaderboard-2": Suite(
        (
            Entry("leaderboard_ifeval", "IFEval", "inst_level_strict_acc,none"),
            Entry("leaderboard_bbh", "BBH", "acc_norm,none"),
            Entry("leaderboard_math_hard", "MATH, level 5", "exact_match,none"),
            Entry("leaderboard_gpqa", "GPQA", "acc_norm,none"),
            Entry("leaderboard_musr", "MuSR", "acc_norm,none"),
            Entry("leaderboard_mmlu_pro", "MMLU-Pro", "acc,none"),
        ),
        {},
    ),
    "mini": Suite(
        (
            Entry("mini_arithmetic", "sums, worked out", "exact_match,last-number"),
            Entry("mini_facts", "facts", "acc,none"),
            Entry("mini_completion", "sentence completion", "acc_norm,none"),
            Entry("mini_pronouns", "which of the two", "acc,none"),
            Entry("mini_knock", "knock-knock turns", "exact_match,line"),
            Entry("mini_code", "code", "bits_per_byte,none"),
            Entry("mini_prose", "prose", "bits_per_byte,none"),
        ),
        {},
    ),
    "mini-chat": Suite(
        (
            Entry("mini_chat_arithmetic", "sums, worked out", "exact_match,last-number"),
            Entry("mini_chat_facts", "facts", "acc,none"),
        ),
        {},
        chat=True,
    ),
}


def published_beside(suite: Suite, config: Gemma2Config) -> dict[str, Mapping[str, float]]:
    """The published columns for a model: those of its size and what they were compared to; for other sizes, Gemma's."""
    size = next((name for name in _BESIDE if Gemma2Config(**PRESETS[name]) == _without_vocabulary(config)), None)
    chosen = suite.published
    if size:
        names = [name for name in chosen if name.startswith(f"Gemma 2 {size},")] + list(_BESIDE[size])
    else:
        names = [name for name in chosen if name.endswith(", report")]
    return {name: chosen[name] for name in names if name in chosen}


def _without_vocabulary(config: Gemma2Config) -> Gemma2Config:
    """What tells the sizes apart: chat models stop at other tokens, and ablations have another window."""
    plain = Gemma2Config(**PRESETS["2b"])
    names = ("vocab_size", "eos_ids", "pad_id", "bos_id", "sliding_window", "attn_softcap", "max_position")
    return replace(config, **{name: getattr(plain, name) for name in names})
