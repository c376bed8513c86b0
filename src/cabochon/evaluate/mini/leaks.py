"""Whether test items were in what the model inside was trained on, or are among their own examples."""

import json
from collections.abc import Iterable, Iterator, Sequence

from cabochon.data.miniature import arithmetic, facts, jokes, source
from cabochon.evaluate.mini.items import Item

RUN = 8  # words; the same so many in a row are taken for the same text
SHARE = 0.2  # of an item's runs that training may have too: phrases that everyone writes


def leaking(name: str, test: Sequence[Item], train: Sequence[Item]) -> Iterator[int]:
    """Numbers of test items of a task that are not new."""
    examples = {json.dumps(item, sort_keys=True) for item in train}
    seen = _seen_in_training([_text(item) for item in test]) if name in ("completion", "code", "prose") else None
    for number, item in enumerate(test):
        known = seen[number] > SHARE if seen is not None else not _is_held_out(name, item)
        if known or json.dumps(item, sort_keys=True) in examples:
            yield number


def _is_held_out(name: str, item: Item) -> bool:
    if name == "arithmetic":
        operation, a, b, way = item["problem"]
        return arithmetic.is_held_out(arithmetic.Problem(operation, a, b), way)
    if name == "facts":
        kind_name, subject, way = item["fact"]
        kind = next(kind for kind in facts.KINDS if kind.name == kind_name)
        return facts.is_held_out(kind, next(pair for pair in kind.pairs if pair[0] == subject), way)
    # Only a name that is repeated can be new: all else about these jokes is their form.
    if name == "knock" and item["expected"][0].endswith(" who?"):
        return jokes.is_held_out(item["expected"][0].removesuffix(" who?"))
    return True


def _text(item: Item) -> str:
    return item["text"] if "text" in item else f"{item['begun']} {item['choices'][item['gold']]}"


def _seen_in_training(texts: Sequence[str]) -> list[float]:
    """The share of each text's runs of words that a training text has as well."""
    own = [set(_runs(text)) for text in texts]
    wanted = set().union(*own)
    trained = (
        text
        for texts in (source.code_files(), source.prose())
        for name, text in texts.items()
        if not source.is_held_out(name)
    )
    seen = {run for text in trained for run in _runs(text) if run in wanted}
    return [len(runs & seen) / max(1, len(runs)) for runs in own]


def _runs(text: str) -> Iterable[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(RUN)), strict=False)
