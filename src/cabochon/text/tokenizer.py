"""Text to token ids and back, for tokenizers of Gemma's kind: BPE, U+2581 for a space, byte fallback.

Two rules that Gemma 2 depends on hold for every entry point. A text gets one BOS, put there by this module and by
nothing else. What a text spells is text: `<end_of_turn>` typed by a user is never the control piece of that name.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.files import atomic_write
from cabochon.text.backends import Backend, open_json, open_sentencepiece

SPACE = "\u2581"
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip

# Some of these are ordinary "user-defined" pieces in Gemma's files, which libraries do match in text.
_RESERVED = re.compile(r"<(pad|eos|bos|unk|mask|2mass|start_of_turn|end_of_turn|unused[0-9]+)>|\[@BOS@\]")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = " A b  c\n\n1234 <b>\t\u00e9\u6f22\U0001f44d "


class Tokenizer:
    """Pieces, their ids and their bytes. Made by `load_tokenizer`.

    Attributes:
        vocab_size: the largest id plus one.
        bos_id, eos_id: the pieces that begin and end a text.
        pad_id: the filler; the id of eos where the vocabulary has none.
        start_of_turn_id, end_of_turn_id: the pieces around a turn of a chat; None where there are none.
        stop_ids: the pieces after which an answer is over.
        control_ids: pieces that are no text: text never becomes one, and decoding leaves them out.
    """

    def __init__(self, backend: Backend, folder: Path) -> None:
        self._backend, self._folder = backend, folder
        ids = backend.ids
        missing = [name for name in ("<bos>", "<eos>") if name not in ids]
        if missing:
            raise _not_gemma(folder, f"its vocabulary has no {' and no '.join(missing)}")
        self.vocab_size = max(ids.values()) + 1
        self.bos_id, self.eos_id = ids["<bos>"], ids["<eos>"]
        self.pad_id = ids.get("<pad>", self.eos_id)
        self.start_of_turn_id, self.end_of_turn_id = ids.get("<start_of_turn>"), ids.get("<end_of_turn>")
        self.stop_ids = frozenset(i for i in (self.eos_id, self.end_of_turn_id) if i is not None)
        control = {piece: i for piece, i in ids.items() if _is_control(piece, i in backend.special)}
        self.control_ids = frozenset(control.values())
        self._forbidden = self.control_ids - {ids.get("<unk>")}
        self._control_text = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        self._pieces = {i: piece for piece, i in ids.items()}
        self._bytes: dict[int, bytes] = {}  # filled as pieces are met
        self._prove()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of a text, with one BOS in front if `bos`. Control pieces spelled in the text stay text.

        Raises:
            BadInput: the text has a lone surrogate, so it is not Unicode.
        """
        _check_unicode(text)
        return ([self.bos_id] if bos else []) + self._encode(text)

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; control pieces show only if asked for."""
        spell = self.token_bytes if skip_control else self._spell
        return b"".join(map(spell, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly what a piece adds to a text, as UTF-8: a part of a character for byte pieces.

        Nothing for control pieces, and for the ids that a model may have beyond its tokenizer.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if token_id in self.control_ids else self._spell(token_id)
            self._bytes[token_id] = found
        return found

    def check_fits(self, vocab_size: int) -> None:
        """Raise `BadInput` if a model with `vocab_size` rows has no row for some piece."""
        if self.vocab_size > vocab_size:
            raise BadInput(
                f"the tokenizer in {self._folder} does not fit the model",
                f"it has ids up to {self.vocab_size - 1}, the model's vocabulary ends at {vocab_size - 1}",
                "use the tokenizer files that came with these weights",
            )

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files as they are in its folder, by name.

        Raises `MissingResource` when they are gone.
        """
        try:
            present = (self._folder / name for name in FILES)
            return {path.name: path.read_bytes() for path in present if path.is_file()}
        except OSError as error:
            raise MissingResource(
                f"the tokenizer files in {self._folder} cannot be read",
                error.strerror or str(error),
                "check that the folder is still there",
            ) from None

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, unchanged, into a folder that exists."""
        for name, content in self.files().items():
            with atomic_write(folder / name) as file:
                file.write(content)

    def _encode(self, text: str) -> list[int]:
        ids = self._backend.encode(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        # The library saw a control piece in the text. Broken after its first character, it cannot see it again.
        cuts = [match.start() + 1 for match in self._control_text.finditer(text)]
        if not cuts:  # only a normalizer can have made it; there is no text to keep
            return [i for i in ids if i not in self._forbidden]
        parts = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [i for start, end in parts for i in self._encode(text[start:end])]

    def _spell(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id, "")
        byte = _BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()

    def _prove(self) -> None:
        """Refuse a file that spells text in another way (bytes as letters, a space put in front)."""
        ids = [i for i in self._encode(_PROBE) if i not in self.control_ids]
        if self.decode(ids) != self._backend.decode(ids):
            raise _not_gemma(self._folder, "its pieces do not spell text as Gemma's do")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, or else `tokenizer.model`.

    Raises:
        MissingResource: neither file is there, one cannot be read, or the `sentencepiece` extra is needed.
        BadInput: the file is damaged, or is not a tokenizer of Gemma's kind.
    """
    folder = Path(folder)
    for name, opener in (("tokenizer.json", open_json), ("tokenizer.model", open_sentencepiece)):
        if (folder / name).exists():
            return Tokenizer(opener(folder / name), folder)
    raise MissingResource(
        f"{folder} has no tokenizer",
        "there is no tokenizer.json and no tokenizer.model in it",
        "copy one of them there from where the model came from, or pass token ids instead of text",
    )


def _is_control(piece: str, special: bool) -> bool:
    # Runs of spaces and line ends are text, whatever a file calls them.
    return bool(_RESERVED.fullmatch(piece)) or (special and bool(piece.replace(SPACE, " ").strip()))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            "the text is not valid Unicode",
            f"character {error.start + 1} is half of a surrogate pair (U+{ord(text[error.start]):04X})",
            "decode the input as UTF-8 and replace what does not decode, for example errors='replace'",
        ) from None


def _not_gemma(folder: Path, cause: str) -> BadInput:
    return BadInput(
        f"the tokenizer in {folder} is not one of Gemma's kind",
        cause,
        "use the tokenizer files that came with the model",
    )
