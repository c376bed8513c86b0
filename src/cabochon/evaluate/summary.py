"""From what the harness returns to our records."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cabochon.evaluate.mini.baselines import Baseline
from cabochon.evaluate.prompts import shown
from cabochon.evaluate.results import Item, Result
from cabochon.evaluate.suites import Entry

_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


def results_of(
    output: Mapping[str, Any],
    entry: Entry,
    published: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Baseline],
    truncated: Mapping[str, int],
) -> list[Result]:
    """A record for each metric of each task and group of an entry; the entry's own come first."""
    return [
        _result(output, entry, task, metric, number, published, baselines, truncated)
        for task in sorted(output["results"], key=lambda name: (name != entry.task, name))
        for number, metric in enumerate(_metrics(output["results"][task]))
    ]


def _metrics(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        name = key.split(",")[0]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in _NOT_METRICS and number and not name.endswith("_stderr"):
            yield key


def _result(
    output: Mapping[str, Any],
    entry: Entry,
    task: str,
    metric: str,
    number: int,
    published: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Baseline],
    truncated: Mapping[str, int],
) -> Result:
    values, own = output["results"][task], task in _asked_for(output, entry)
    name, _, kind = metric.partition(",")
    members = _members(output, task)
    counts = metric == entry.metric if own and entry.metric else number == 0
    guess = baselines.get(task.replace("mini_chat_", "mini_")) if counts else None
    better = output["higher_is_better"].get(task, {}).get(name)
    theirs = {who: scores[entry.label] / 100 for who, scores in published.items() if entry.label in scores}
    return Result(
        task=task,
        label=entry.label if task == entry.task else str(values.get("alias", task)).strip(" -"),
        metric=metric,
        value=float(values[metric]),
        stderr=_stderr(values.get(f"{name}_stderr,{kind}"), output, task, metric),
        items=int(values.get("sample_len") or sum(output["n-samples"][m]["effective"] for m in members)),
        shots=output["n-shot"].get(task),
        higher_is_better=better is not False,
        counts=counts,
        part_of=None if own else entry.task,
        truncated=sum(truncated.get(member, 0) for member in members),
        random=guess.random if guess else None,
        majority=guess.majority if guess else None,
        published=theirs if own and counts else {},
    )


def _asked_for(output: Mapping[str, Any], entry: Entry) -> list[str]:
    """What a name stands for: a task or a group, or all that a tag or a file brought but the parts of groups."""
    if entry.task in output["results"]:
        return [entry.task]
    parts = {part for inner in output["group_subtasks"].values() for part in inner}
    return [task for task in output["results"] if task not in parts]


def _members(output: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, through groups of groups; of a task, itself."""
    inner = output["group_subtasks"].get(name)
    return [m for child in inner for m in _members(output, child)] if inner else [name]


def _stderr(given: Any, output: Mapping[str, Any], task: str, metric: str) -> float | None:
    if isinstance(given, int | float):
        return float(given)
    if metric.split(",")[0] == "bits_per_byte":
        pairs = [s["bits_per_byte"] for s in output["samples"].get(task, ())]
        return bits_stderr(pairs)
    return None


def bits_stderr(pairs: "list[tuple[float, int]]") -> float | None:
    """Standard error of bits per byte of (log-probability, bytes) pairs: a ratio of sums, linearised."""
    if len(pairs) < 2:
        return None
    size = sum(n for _, n in pairs)
    ratio = -sum(x for x, _ in pairs) / size
    square = sum((-x - ratio * n) ** 2 for x, n in pairs) * len(pairs) / (len(pairs) - 1)
    return math.sqrt(square) / size / math.log(2)


def items_of(output: Mapping[str, Any]) -> dict[str, list[Item]]:
    """By task, what was asked, what came, and what that scored."""
    return {task: [_item(sample) for sample in samples] for task, samples in output["samples"].items()}


def _item(sample: Mapping[str, Any]) -> Item:
    asked = sample["arguments"]
    prompts = [shown(str(arguments[0])) for arguments in asked]
    # Of a prompt whose answer is written, the second argument says how it is drawn.
    choices = [a[1] for a in asked if len(a) > 1 and isinstance(a[1], str)]
    return {
        "id": sample["doc_id"],
        "key": f"{sample['doc_hash'][:16]}-{sample['filter']}",
        "filter": sample["filter"],
        "prompt": prompts[0] if len(set(prompts)) == 1 else prompts,
        "choices": choices or None,
        "target": sample["target"],
        "answers": [_answer(r) for r in sample["filtered_resps"]],
        "raw": [r[0] if len(r) == 1 else r for r in sample["resps"]],
        "scores": {name: _plain(sample[name]) for name in sample["metrics"]},
    }


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, so that JSON takes them."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def _answer(response: Any) -> Any:
    return list(response) if isinstance(response, tuple) else response
