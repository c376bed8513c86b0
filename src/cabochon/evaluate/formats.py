"""The same questions written in other ways, to see how much a score depends on the writing.

The Gemma 2 report gives the spread of MMLU over twelve formats (arXiv 2408.00118).
"""

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from cabochon.base.errors import UsageError
from cabochon.evaluate.results import Result, Spread

# What heads a question or its answer, what parts them, and what parts one example from the next.
_HEADS: tuple[Callable[[str], str], ...] = (lambda text: text, str.upper, lambda text: text[:1])
_JOINTS = ("\n", "  ")
_GAPS = ("\n\n", "\n")
FORMATS = [(head, joint, gap) for gap in _GAPS for joint in _JOINTS for head in _HEADS]
_LABEL = re.compile(r"^([A-Z][a-z]+)(?=:)", re.MULTILINE)


def apply_format(task: Any, number: int) -> bool:
    """Make a task write its prompts in one of `FORMATS`; the first is its own. False: it has no choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return False
    head, joint, gap = FORMATS[number]
    plain = task.doc_to_text

    def doc_to_text(*arguments: Any, **named: Any) -> Any:
        text = plain(*arguments, **named)
        return rewritten(text, head, joint) if isinstance(text, str) else text

    task.doc_to_text = doc_to_text
    if task.fewshot_cfg.fewshot_delimiter == "\n\n":
        task.fewshot_cfg.fewshot_delimiter = gap
    return True


def rewritten(text: str, head: Callable[[str], str], joint: str) -> str:
    """A prompt with its labels ("Question:") and its line ends written otherwise."""
    return _LABEL.sub(lambda found: head(found[1]), text).replace("\n", joint)


def check_formats(count: int) -> None:
    """Raises `UsageError` for more formats than there are."""
    if not 0 <= count <= len(FORMATS) or count == 1:
        raise UsageError(
            f"--formats cannot be {count}", f"there are {len(FORMATS)}, and a spread needs two", "use --formats 12"
        )


def spread_of(results: Sequence[Result]) -> Spread:
    """Of one metric in several formats."""
    values = [result.value for result in results]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return Spread(results[0].label, results[0].metric, len(values), mean, deviation, min(values), max(values))
