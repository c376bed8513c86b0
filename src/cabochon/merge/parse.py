"""mergekit's YAML, as it is, to a `MergeConfig`. Whatever is wrong is said with its place in the file."""

import contextlib
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from cabochon.base.errors import BadInput, MissingResource, nearest
from cabochon.merge.config import (
    Filtered,
    MergeConfig,
    ModelRef,
    Parameters,
    Scalar,
    Setting,
    Slice,
    Source,
    TokenChoice,
    TokenizerChoice,
)

T = TypeVar("T")
MAX_FILE = 1 << 20
DTYPES = ("bfloat16", "float16", "float32")
MODULE = "default"  # mergekit's name for the one part that a language model has
_TOP = (
    *("models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "parameters"),
)


def read_config(path: Path) -> MergeConfig:
    """The merge that a file describes. Raises `MissingResource`, or `BadInput` naming the place in the file."""
    document, text = read_document(path)
    return Parser(str(path)).config(document, text)


def read_document(path: Path) -> tuple[Any, str]:
    """The values in a YAML file, and its text. Raises `MissingResource`, or `BadInput`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise _unsound(str(path), f"it is larger than {MAX_FILE} bytes")
        text = raw.decode("utf-8")
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check the path") from None
    except UnicodeDecodeError:
        raise _unsound(str(path), "it is not UTF-8 text") from None
    return parse_document(text, str(path)), text


def parse_config(text: str, file: str = "the configuration") -> MergeConfig:
    """The merge that YAML describes. Raises `BadInput`; `file` is named in errors."""
    return Parser(file).config(parse_document(text, file), text)


def parse_document(text: str, file: str) -> Any:
    """The values in YAML: numbers, texts, lists and mappings. Raises `BadInput`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise _unsound(file, f"{getattr(error, 'problem', None) or 'it is not sound YAML'}{line}") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        raise _unsound(file, str(error)) from None
    except RecursionError:
        raise _unsound(file, "it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Knows scalars, lists and mappings. A tag that asks for an object is an error, and so is a repeated key."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Comes before a mapping is built, and before another takes it in (`<<`), which may well repeat its keys."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            again = next((key for key, count in keys.items() if count > 1), None)
            if again is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{again!r} is there twice", node.start_mark)
        super().flatten_mapping(node)


def _unsound(file: str, cause: str) -> BadInput:
    return BadInput(f"{file} cannot be used", cause, "write it as docs/merging.md shows")


class Parser:
    """Turns plain YAML values into the classes above; `where` is the place in the file, for errors."""

    def __init__(self, file: str) -> None:
        self._file = file

    def config(self, document: Any, text: str) -> MergeConfig:
        top = self.mapping(document, "the file", _TOP)
        method = self.text(top.get("merge_method"), "merge_method")
        if top.get("tokenizer_source") is not None and top.get("tokenizer") is not None:
            self.fail("tokenizer", "tokenizer_source is there, too", "leave one of them out")
        slices, module = self._slices(top, "the file")
        return MergeConfig(
            method=method,
            slices=slices,
            base=self.optional(top, "base_model", self.model),
            dtype=self.optional(top, "dtype", self._dtype),
            out_dtype=self.optional(top, "out_dtype", self._dtype),
            tokenizer=self._tokenizer(top),
            chat_template=self.optional(top, "chat_template", self.text),
            module_parameters=module,
            parameters=self.parameters(top.get("parameters"), "parameters"),
            text=text,
        )

    def _slices(self, level: Mapping[str, Any], where: str) -> tuple[tuple[Slice, ...], Parameters]:
        given = [key for key in ("models", "slices", "modules") if level.get(key)]
        if len(given) != 1:
            cause = f"it has {' and '.join(given)}" if given else "it has none of them"
            self.fail(where, cause, "give exactly one of models, slices and modules")
        if given == ["modules"]:
            modules = self.mapping(level["modules"], "modules", (MODULE,))
            inner = self.mapping(modules.get(MODULE), f"modules.{MODULE}", ("models", "slices", "parameters"))
            slices, _ = self._slices(inner, f"modules.{MODULE}")
            return slices, self.parameters(inner.get("parameters"), f"modules.{MODULE}.parameters")
        if given == ["models"]:
            sources = [self._source(s, f"models[{i}]", ()) for i, s in self.items(level["models"], "models")]
            return (Slice(tuple(sources)),), {}
        return tuple(self._slice(s, f"slices[{i}]") for i, s in self.items(level["slices"], "slices")), {}

    def _slice(self, value: Any, where: str) -> Slice:
        # residual_weight: mergekit reads it and does nothing with it.
        level = self.mapping(value, where, ("sources", "base_model", "parameters", "residual_weight"))
        sources = tuple(
            self._source(s, f"{where}.sources[{i}]", ("layer_range",))
            for i, s in self.items(level.get("sources"), f"{where}.sources")
        )
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            self.fail(where, "its sources have different numbers of layers", "make the layer ranges equally long")
        return Slice(
            sources,
            self.optional(level, "base_model", self.model),
            self.parameters(level.get("parameters"), f"{where}.parameters"),
        )

    def _source(self, value: Any, where: str, also: tuple[str, ...]) -> Source:
        level = self.mapping(value, where, ("model", "parameters", *also))
        model = self.model(level.get("model"), f"{where}.model")
        parameters = self.parameters(level.get("parameters"), f"{where}.parameters")
        if "layer_range" not in also:
            return Source(model, None, parameters)
        given = level.get("layer_range")
        if not isinstance(given, list) or len(given) != 2 or not all(type(n) is int for n in given):
            self.fail(f"{where}.layer_range", f"it is {_short(given)}", "give two whole numbers: [0, 12]")
        first, end = given
        if not 0 <= first < end:
            self.fail(f"{where}.layer_range", f"there are no layers from {first} to {end}", "as in [0, 12]")
        return Source(model, (first, end), parameters)

    def model(self, value: Any, where: str) -> ModelRef:
        if isinstance(value, str):
            try:
                return ModelRef.parse(value)
            except ValueError as error:
                self.fail(where, str(error), "write MODEL@REVISION+ADAPTER")
        level = self.mapping(value, where, ("model", "lora", "override_architecture"))
        if level.get("override_architecture") not in (None, "Gemma2ForCausalLM"):
            self.fail(where, f"it asks for {_short(level['override_architecture'])}", "merge Gemma 2 models")
        model = self.path(level.get("model"), f"{where}.model")
        adapter = self.path(level["lora"], f"{where}.lora") if level.get("lora") else (None, None)
        return ModelRef(model[0] or "", model[1], *adapter)

    def path(self, value: Any, where: str) -> tuple[str | None, str | None]:
        if isinstance(value, str):
            path, _, revision = value.partition("@")
            return path, revision or None
        level = self.mapping(value, where, ("path", "revision"))
        return self.text(level.get("path"), f"{where}.path"), self.optional(level, "revision", self.text)

    def _tokenizer(self, top: Mapping[str, Any]) -> TokenizerChoice | None:
        if top.get("tokenizer_source") is not None:
            return TokenizerChoice(self._tokenizer_source(top["tokenizer_source"], "tokenizer_source"))
        if top.get("tokenizer") is None:
            return None
        level = self.mapping(top["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        multiple = level.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            self.fail("tokenizer.pad_to_multiple_of", f"it is {_short(multiple)}", "give a number such as 64")
        tokens = self.mapping(level.get("tokens") or {}, "tokenizer.tokens", None)
        source = self._tokenizer_source(level.get("source", "union"), "tokenizer.source")
        return TokenizerChoice(
            source, {token: self._token(v, f"tokenizer.tokens.{token}") for token, v in tokens.items()}, multiple
        )

    def _tokenizer_source(self, value: Any, where: str) -> str | ModelRef:
        return value if value in ("union", "base") else self.model(value, where)

    def _token(self, value: Any, where: str) -> TokenChoice | bool:
        level = self.mapping(value, where, ("source", "force"))
        force, source = level.get("force", False), level.get("source")
        if not isinstance(force, bool):
            self.fail(f"{where}.force", f"it is {_short(force)}", "give true or false")
        if source is None:
            return force
        if isinstance(source, dict) and "kind" in source:
            inner = self.mapping(source, f"{where}.source", ("kind", "model", "token", "token_id"))
            if inner["kind"] == "zero":
                return TokenChoice(None, force=force)
            token, number = inner.get("token"), inner.get("token_id")
            named = isinstance(token, str) and number is None
            numbered = type(number) is int and number >= 0 and token is None
            if inner["kind"] != "model_token" or not (named or numbered):
                self.fail(f"{where}.source", "it says neither zero nor one token", "give kind, model and token")
            return TokenChoice(self.model(inner.get("model"), f"{where}.source.model"), token, number, force)
        return TokenChoice(self.model(source, f"{where}.source"), force=force)

    def parameters(self, value: Any, where: str) -> Parameters:
        level = self.mapping(value or {}, where, None)
        return {name: self._setting(v, f"{where}.{name}") for name, v in level.items() if v is not None}

    def _setting(self, value: Any, where: str) -> Setting:
        if isinstance(value, dict):
            return (self._filtered(value, where),)
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            return tuple(self._filtered(v, f"{where}[{i}]") for i, v in enumerate(value))
        return self._values(value, where)

    def _filtered(self, value: Any, where: str) -> Filtered:
        level = self.mapping(value, where, ("filter", "value"))
        return Filtered(self._values(level.get("value"), f"{where}.value"), self.optional(level, "filter", self.text))

    def _values(self, value: Any, where: str) -> Scalar | tuple[Scalar, ...]:
        if isinstance(value, list) and value:
            return tuple(self._scalar(v, f"{where}[{i}]") for i, v in enumerate(value))
        return self._scalar(value, where)

    def _scalar(self, value: Any, where: str) -> Scalar:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            self.fail(where, f"{_short(value)} is not a number", "give a number, a list of them, or filters")
        return value

    def _dtype(self, value: Any, where: str) -> str:
        name = self.text(value, where).removeprefix("torch.")
        if name not in DTYPES:
            self.fail(where, f"no dtype {_short(name)} here", f"choose {', '.join(DTYPES)}")
        return name

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            self.fail(where, "it is missing" if value is None else f"{_short(value)} is not text", "give a text")
        return value

    def optional(self, level: Mapping[str, Any], key: str, read: Callable[[Any, str], T]) -> T | None:
        return read(level[key], key) if level.get(key) is not None else None

    def items(self, value: Any, where: str) -> Iterator[tuple[int, Any]]:
        if not isinstance(value, list) or not value:
            self.fail(where, "it is not a list of something", "write its entries as a list")
        return enumerate(value)

    def mapping(self, value: Any, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self.fail(where, f"{_short(value)} is not a mapping", "write it as `key: value` lines")
        unknown = next((key for key in value if known is not None and key not in known), None)
        if unknown is not None:
            close = nearest(unknown, known or ())
            hint = f"did you mean {close}?" if close else f"use {', '.join(known or ())}"
            self.fail(where, f"the key {unknown} is unknown", hint)
        return value

    def fail(self, where: str, cause: str, hint: str) -> NoReturn:
        place = "" if where == "the file" else f" at {where}"
        raise BadInput(f"{self._file} cannot be used{place}", cause, hint)


def _short(value: Any) -> str:
    return reprlib.repr(value)
