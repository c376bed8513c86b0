"""The chat template of a merge, which only other programs read: cabochon knows Gemma's format by itself."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cabochon.base.errors import BadInput, nearest
from cabochon.merge.sources import Opened
from cabochon.text.chat import CHAT_TEMPLATE
from cabochon.weights.header import parse_json

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"
LISTS = ("tokenizer.json", "tokenizer.model", "added_tokens.json")  # files in which every token is spelled

# Formats by the names that mergekit has for them, and Gemma's own. mergekit's templates leave <bos> out; Gemma 2 has
# never seen a text without.
TEMPLATES = {
    "gemma": CHAT_TEMPLATE,
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% set names = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
        "{{ bos_token }}{% for message in messages %}{% set name = names.get(message['role']) %}"
        "{{ ('### ' ~ name ~ ':\n' if name else '') ~ message['content'] | trim }}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
MARKS = {"gemma": ("<start_of_turn>", "<end_of_turn>"), "chatml": ("<|im_start|>", "<|im_end|>")}
_FOREIGN = ("llama3", "mistral", "exaone")  # mergekit's other names


def with_chat_template(
    files: Mapping[str, bytes], choice: str | None, models: Sequence[Opened]
) -> tuple[dict[str, bytes], list[str]]:
    """Tokenizer files with the template that a configuration asks for, and notes for the user.

    Args:
        files: by name.
        choice: None for what is there, "auto" for the most frequent among the models, one of `TEMPLATES`, or the text
            of a template.

    Raises `BadInput` for any other word.
    """
    if choice is None:
        return dict(files), []
    text, notes = TEMPLATES.get(choice, choice), []
    if choice == "auto":
        found = Counter(own for model in models if (own := _template(model)))
        if not found:
            return dict(files), ["no model has a chat template"]
        text = found.most_common(1)[0][0]
    elif choice in TEMPLATES:
        pieces = b"".join(files.get(name, b"") for name in LISTS)
        missing = [mark for mark in MARKS.get(choice, ()) if mark.encode() not in pieces]
        if missing:
            notes = [f"the tokenizer has no token {' and no '.join(missing)}: in the {choice} template these are text"]
    elif "{" not in choice:
        raise _unknown(choice)
    document = parse_json(files.get(CONFIG, b"{}"), Path(CONFIG))
    written = json.dumps(document | {"chat_template": text}, indent=2, ensure_ascii=False) + "\n"
    return {name: content for name, content in files.items() if name != FILE} | {CONFIG: written.encode()}, notes


def _unknown(choice: str) -> BadInput:
    known = f"auto, {', '.join(TEMPLATES)}, or the text of a template"
    if choice in _FOREIGN:
        return BadInput(
            f"the chat template {choice} cannot be used by its name",
            "it is for models with other control tokens than Gemma 2's",
            f"write {known}",
        )
    close = nearest(choice, ("auto", *TEMPLATES))
    return BadInput(
        f"there is no chat template {choice}", "its name is unknown", f"did you mean {close}?" if close else known
    )


def _template(model: Opened) -> str | None:
    """The template in a model's folder, if any; of several, the one that is called default."""
    own, config = model.folder / FILE, model.folder / CONFIG
    if own.is_file():
        return own.read_bytes().decode(errors="replace").strip()
    found = parse_json(config.read_bytes(), config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), 0
        )
    return found.strip() if isinstance(found, str) else None
