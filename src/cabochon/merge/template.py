"""The chat template of a merge, which only other programs read: cabochon knows Gemma's format by itself."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cabochon.base.errors import BadInput
from cabochon.merge.sources import Opened

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"


def with_chat_template(files: Mapping[str, bytes], choice: str | None, models: Sequence[Opened]) -> dict[str, bytes]:
    """Tokenizer files with the template that a configuration asks for.

    Args:
        files: by name.
        choice: None for what is there, "auto" for the most frequent among the models, or the text of a template.

    Raises `BadInput` for any other word.
    """
    if choice is None:
        return dict(files)
    if choice == "auto":
        found = Counter(text for model in models if (text := _template(model)))
        if not found:
            return dict(files)
        choice = found.most_common(1)[0][0]
    elif "{" not in choice:
        raise BadInput(
            f"there is no chat template {choice}",
            "the names that mergekit knows belong to other models",
            "write auto, or the text of a template",
        )
    document: dict[str, Any] = json.loads(files.get(CONFIG, b"{}"))
    written = json.dumps(document | {"chat_template": choice}, indent=2, ensure_ascii=False) + "\n"
    return {name: content for name, content in files.items() if name != FILE} | {CONFIG: written.encode()}


def _template(model: Opened) -> str | None:
    """The template in a model's folder, if any."""
    if (model.folder / FILE).is_file():
        return (model.folder / FILE).read_text(encoding="utf-8").strip()
    if not (model.folder / CONFIG).is_file():
        return None
    text = json.loads((model.folder / CONFIG).read_text(encoding="utf-8")).get("chat_template")
    return text.strip() if isinstance(text, str) else None
