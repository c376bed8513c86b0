"""A merge from its configuration to a folder: open, plan, execute."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from cabochon.base.version import package_version
from cabochon.merge.card import card
from cabochon.merge.config import MergeConfig, ModelRef
from cabochon.merge.execute import execute
from cabochon.merge.plan import Plan, plan
from cabochon.merge.sources import Opened, open_models
from cabochon.weights.save import SHARD_BYTES

CONFIG_FILE = "mergekit_config.yml"  # where the Hub's merges have it
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)


def merge_models(
    config: MergeConfig,
    out: Path,
    *,
    seed: int = 0,
    threads: int = 0,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    token: str | None = None,
    offline: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Merge models into a new folder, whole or not at all, and give the plan that was carried out.

    Args are those of `execute.execute` and `sources.open_models`, which also say what is raised; `seed` is for the
    methods that drop weights at random.
    """
    models = open_models(config.models(), token=token, offline=offline)
    laid_out = plan(config, models, seed=seed)
    donor = models[config.base or config.models()[0]]
    files = {
        **tokenizer_files(donor),
        "README.md": card(out.name, config, laid_out, models, seed).encode(),
        CONFIG_FILE: config.text.encode(),
    }
    execute(
        laid_out,
        models,
        out,
        key=work_key(config, models, seed, shard_bytes),
        files=files,
        threads=threads,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        report=report,
    )
    return laid_out


def work_key(config: MergeConfig, models: Mapping[ModelRef, Opened], seed: int, shard_bytes: int) -> str:
    """What the bytes of a merge depend on, as one word: unfinished work with another one is of no use."""
    states = [line for model in models.values() for line in model.identity()]
    told = "\n".join([package_version(), repr(config), str(seed), str(shard_bytes), *states])
    return hashlib.sha256(told.encode()).hexdigest()


def tokenizer_files(model: Opened) -> dict[str, bytes]:
    """The files of a model's tokenizer, unchanged."""
    paths = (model.folder / name for name in TOKENIZER_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
