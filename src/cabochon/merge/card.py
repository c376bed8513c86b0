"""The model card of a merge: what it is made of, and how to make it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cabochon.base.version import package_version
from cabochon.merge.config import MergeConfig, ModelRef
from cabochon.merge.plan import Plan
from cabochon.merge.sources import Opened
from cabochon.weights.hub import REPO_ID

_TEXT = """\
---
{metadata}---

# {name}

A merge of {count} made by cabochon {version} with the method `{method}` ({source}).

| part | model | {digest} |
|---|---|---|
{rows}

{parameters:,} parameters in {dtype}, {layers} layers.{seed}

## Configuration

`cabochon merge mergekit_config.yml OUT` makes it again.

```yaml
{config}
```
"""


def card(
    name: str, config: MergeConfig, plan: Plan, models: Mapping[ModelRef, Opened], *, seed: int, hashes: bool
) -> str:
    """The `README.md` of a merged model, with the metadata that the Hub reads; `hashes` as in `Opened.digests`."""
    hub = [ref.path for ref in models if REPO_ID.fullmatch(ref.path) and not Path(ref.path).exists()]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["gemma2", "merge", "cabochon"]}
    if hub:
        metadata |= {"base_model": hub, "base_model_relation": "merge"}
    rows = [
        f"| {'base' if ref == config.base else 'model'} | {ref} | {_digests(model, hashes)} |"
        for ref, model in models.items()
    ]
    return _TEXT.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        count="one model" if len(models) == 1 else f"{len(models)} models",
        version=package_version(),
        method=config.method,
        source=plan.method.source,
        digest="SHA-256 of the weights",
        rows="\n".join(rows),
        parameters=plan.shape.num_parameters,
        dtype=str(plan.dtype).removeprefix("torch."),
        layers=plan.shape.num_layers,
        seed=f" Seed {seed}." if plan.method.random else "",
        config=config.text.strip(),
    )


def _digests(model: Opened, compute: bool) -> str:
    return ", ".join(f"`{digest}`" if digest else "not computed" for digest in model.digests(compute=compute))
