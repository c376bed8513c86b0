"""The chat template of a merge, which only other programs read: cabochon knows Gemma's format by itself."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cabochon.base.errors import BadInput
from cabochon.merge.sources import Opened
from cabochon.weights.header import parse_json

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
    document = parse_json(files.get(CONFIG, b"{}"), Path(CONFIG))
    written = json.dumps(document | {"chat_template": choice}, indent=2, ensure_ascii=False) + "\n"
    return {name: content for name, content in files.items() if name != FILE} | {CONFIG: written.encode()}


def _template(model: Opened) -> str | None:
    """The template in a model's folder, if any."""
    own, config = model.folder / FILE, model.folder / CONFIG
    if own.is_file():
        return own.read_bytes().decode(errors="replace").strip()
    text = parse_json(config.read_bytes(), config).get("chat_template") if config.is_file() else None
    return text.strip() if isinstance(text, str) else None
