"""What a LoRA adapter's adapter_config.json says, as far as it changes weights, and what is called how in its folder.

    adapter_config.json         what is adapted and how strongly
    adapter_model.safetensors   lora_A [r, K] and lora_B [N, r] of each matrix; whole tensors of `modules_to_save`

N and K are a matrix's outputs and inputs, r the rank.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, MissingResource, nearest
from cabochon.weights.header import broken, parse_json
from cabochon.weights.names import to_hf

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
EMBEDDING = "embedding.weight"
ALL_LINEAR = "all-linear"
# Start values after which the base is another one: B A says nothing without it.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What does not change what a stored adapter does to linear layers of a Gemma 2. `fan_in_fan_out` is for layers that
# store their weight the other way round, which PEFT switches off for linear ones.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "layers_pattern", "runtime_config"),
    *("ensure_weight_tying",),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"),
}
MAX_RANK, MAX_PATTERN, MAX_REPEATS = 1 << 16, 500, 4


@dataclass(frozen=True)
class LoraSettings:
    """A checked adapter_config.json; names as there.

    `targets`: parts of module names, a pattern, or None for what the tensors say. `excluded`: likewise.
    """

    r: int
    lora_alpha: float
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    base_model: str | None = None

    @property
    def base_hint(self) -> str:
        """What to do when the adapter does not fit a model."""
        return "use the model that it was trained on" + (f", {self.base_model}" if self.base_model else "")

    def rank(self, module: str) -> int:
        """The rank of a module's matrices."""
        return int(_looked_up(self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """What a module's scale is made of."""
        return _looked_up(self.alpha_pattern, module, self.lora_alpha)

    def check_targets(self, folder: Path, modules: Sequence[str], adapted: Collection[str]) -> None:
        """Raise `BadInput` unless the modules that have tensors are those that the configuration names.

        Args:
            modules: all matrices that the model has.
            adapted: those that the adapter has tensors for.
        """
        for target in self.targets if isinstance(self.targets, tuple) else ():
            if target != "lm_head" and not any(_ends_with(module, target) for module in modules):
                ends = {module.rpartition(".")[2] for module in modules}
                close = nearest(target, ends)
                raise BadInput(
                    f"the adapter in {folder} does not fit the model",
                    f"it targets {target!r}, and the model has no such module",
                    f"did you mean {close}?" if close else f"there are {', '.join(sorted(ends))}",
                )
        wanted = {module for module in modules if self._covers(module)}
        odd = sorted(wanted.symmetric_difference(adapted)) if self.targets is not None else []
        if odd or not adapted:
            state = f"has {'no ' if odd and odd[0] in wanted else ''}tensors for"
            raise BadInput(
                f"the adapter in {folder} is not what its {CONFIG} describes",
                f"it {state} {odd[0]} and {len(odd) - 1} more modules" if odd else "it has no tensors of LoRA",
                f"use the adapter_config.json that was saved with the weights; {self.base_hint}",
            )

    def _covers(self, module: str) -> bool:
        if _is_among(self.excluded, module) or any(_ends_with(module, saved) for saved in self.modules_to_save):
            return False
        if self.targets == ALL_LINEAR:
            return not module.endswith("embed_tokens")
        if not _is_among(self.targets or (), module):
            return False
        number = re.search(r"\.layers\.(\d+)\.", module)
        listed = isinstance(self.targets, tuple) and module not in self.targets
        return not (self.layers and listed) or bool(number and int(number[1]) in self.layers)


def read_settings(path: Path) -> LoraSettings:
    """Read and check an adapter_config.json.

    Raises `BadInput` for anything that would not be done exactly, `MissingResource` when it cannot be read.
    """
    try:
        document = parse_json(path.read_bytes(), path)
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check its permissions") from None
    if document.get("peft_type") != "LORA":
        raise _refused(path, f"peft_type is {document.get('peft_type')!r}, and only LORA can be merged")
    for key in sorted(document.keys() - _HARMLESS - _READ):
        if document[key] not in (None, False, 0, "", [], {}):
            raise _refused(path, f"it uses {key}, which is not known here")
    start = document.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise _refused(path, f"init_lora_weights {start!r} changed the base, and without that B A means nothing")
    if document.get("bias", "none") != "none":
        raise _refused(path, "it trains biases, and Gemma 2 has none")
    return LoraSettings(
        r=_number(path, "r", document.get("r"), whole=True),
        lora_alpha=_number(path, "lora_alpha", document.get("lora_alpha")),
        targets=_names(path, document, "target_modules", none=None),
        excluded=_names(path, document, "exclude_modules") or (),
        layers=_layers(path, document.get("layers_to_transform")),
        modules_to_save=_listed(path, document, "modules_to_save"),
        rank_pattern=_patterns(path, document, "rank_pattern", whole=True),
        alpha_pattern=_patterns(path, document, "alpha_pattern"),
        use_rslora=document.get("use_rslora") is True,
        use_dora=document.get("use_dora") is True,
        lora_dropout=_share(path, document.get("lora_dropout", 0.0)),
        base_model=name if isinstance(name := document.get("base_model_name_or_path"), str) else None,
    )


def module_name(name: str) -> str:
    """The name of the module that one of our tensors belongs to, as PEFT sees it in a causal language model."""
    return to_hf(name).removesuffix(".weight")


def _looked_up(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that a whole module name, or its end behind a dot, matches; as PEFT."""
    found = (value for key, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module))
    return next(found, default)


def _ends_with(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _is_among(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends_with(module, name) for name in names)


def _names(path: Path, document: Mapping[str, Any], key: str, none: Any = ()) -> tuple[str, ...] | str | None:
    value = document.get(key)
    if isinstance(value, str) and value != ALL_LINEAR:
        return _pattern(path, key, value)
    if isinstance(value, str):
        return value
    return none if value is None else _listed(path, document, key)


def _listed(path: Path, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise broken(path, f"its {key} is not a list of names")
    return tuple(value)


def _layers(path: Path, value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in given):
        raise broken(path, "its layers_to_transform is not a list of whole numbers")
    return tuple(given)


def _patterns(path: Path, document: Mapping[str, Any], key: str, *, whole: bool = False) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise broken(path, f"its {key} does not map names to numbers")
    return {_pattern(path, key, name): _number(path, key, number, whole=whole) for name, number in value.items()}


def _pattern(path: Path, key: str, text: str) -> str:
    """A regular expression out of a file: sound, and too simple to keep a matcher busy."""
    repeats = len(re.findall(r"[*+{]", text))
    if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)\s*[*+{]|\\\d", text):
        raise _refused(path, f"a pattern in its {key} repeats groups, or is too long")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        raise broken(path, f"a pattern in its {key} is not a regular expression") from None
    return text


def _number(path: Path, key: str, value: Any, *, whole: bool = False) -> Any:
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not 0 < value <= MAX_RANK:
        raise broken(path, f"its {key} has to be {'a whole' if whole else 'a'} number from 0 to {MAX_RANK}, without 0")
    return value


def _share(path: Path, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise broken(path, "its lora_dropout is not a share between 0 and 1")
    return float(value)


def _refused(path: Path, cause: str) -> BadInput:
    return BadInput(
        f"the adapter in {path.parent} cannot be used",
        cause,
        "merge it with PEFT (merge_and_unload), and use the model",
    )
