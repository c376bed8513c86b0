"""The mini suite: the tasks of the Gemma 2 report in miniature, over data that needs no network.

`write` makes a folder of ordinary task files for the evaluation harness, with their data beside them, from a seed. Any
program that reads such files can run them: `lm_eval --include_path FOLDER --tasks mini`.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cabochon.base.files import atomic_folder
from cabochon.base.version import package_version
from cabochon.evaluate.mini.baselines import Baseline, baseline
from cabochon.evaluate.mini.items import Item, make
from cabochon.evaluate.mini.leaks import leaking

SEED = 2408
BASELINES = "baselines.json"
_PLACE = "FOLDER"  # in task files, where the folder's own path goes


def write(folder: Path, seed: int = SEED) -> None:
    """Write the suite into a new folder.

    Beside the task files lie, for each task, NAME.train.jsonl (what examples are taken from), NAME.test.jsonl, and
    `baselines.json`: what guessing scores. No test item can be found in what the model inside was trained on, and none
    is an example. The Python that runs this brings the texts, so another version gives other ones.
    """
    made = make(seed)
    sound = {name: _sound(name, splits) for name, splits in made.items()}
    with atomic_folder(folder, overwrite=True) as new:
        for name, splits in sound.items():
            for split, items in splits.items():
                lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
                (new / f"{name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        found = {
            f"mini_{name}": vars(baseline(name, splits["train"], splits["test"])) for name, splits in sound.items()
        }
        (new / BASELINES).write_text(json.dumps(found, indent=1), encoding="utf-8")
        for file in files(__name__).iterdir():
            if file.name.endswith(".yaml"):
                text = file.read_text(encoding="utf-8").replace(_PLACE, str(folder.resolve()))
                (new / file.name).write_text(text, encoding="utf-8")


def ready(cache: Path, seed: int = SEED) -> Path:
    """The suite's folder in a cache, written unless it is there."""
    folder = cache / f"mini-{package_version()}-python{platform.python_version()}-{seed}"
    if not (folder / BASELINES).is_file():
        write(folder, seed)
    return folder


def read_baselines(folder: Path) -> dict[str, Baseline]:
    """What guessing scores in each task of a folder."""
    found: dict[str, Any] = json.loads((folder / BASELINES).read_text(encoding="utf-8"))
    return {name: Baseline(**values) for name, values in found.items()}


def _sound(name: str, splits: Mapping[str, Sequence[Item]]) -> dict[str, list[Item]]:
    """The splits without test items that leak."""
    bad = set(leaking(name, splits["test"], splits["train"]))
    return {"train": list(splits["train"]), "test": [item for n, item in enumerate(splits["test"]) if n not in bad]}
