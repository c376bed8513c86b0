"""`cabochon merge` of a file with `adapters`: several adapters to one."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubAccess

if TYPE_CHECKING:
    from cabochon.merge.adapter_parse import AdapterConfig
    from cabochon.merge.adapter_run import AdapterMerge


def merge_adapters(
    config: "AdapterConfig",
    out: Path | None,
    *,
    dry_run: bool,
    seed: int,
    overwrite: bool,
    json: bool,
    hub: HubAccess,
    foreign: dict[str, bool],
) -> None:
    """Merge adapters, or print what would be done. `foreign`: flags that mean nothing here, and whether they are used.

    Raises `UsageError` for one of these.
    """
    used = next((flag for flag, given in foreign.items() if given), None)
    if used:
        raise UsageError(f"{used} has no effect here", "the file merges adapters, not models", "leave it out")
    from cabochon.base.progress import track
    from cabochon.merge.adapter_run import AdapterMerge

    work = AdapterMerge.prepare(config, seed=seed, **asdict(hub))
    for note in work.notes:
        print(f"note: {note}", file=sys.stderr)
    facts: dict[str, Any] = {
        "method": config.combination.name,
        "adapters": len(work.adapters),
        "base_model": str(work.base),
        "matrices": len(work.matrices),
        "notes": list(work.notes),
    }
    if out is None or dry_run:
        print(json_format.dumps(facts) if json else _table(work, facts))
        return
    with track(len(work.matrices), "merging", unit="matrices") as advance:
        merged = work.write(out, overwrite=overwrite, done=lambda _: advance(1))
    if merged.lost > 0:
        print(f"{100 * merged.lost:.3g}% of the sum's energy was cut off", file=sys.stderr)
    print(json_format.dumps({"folder": str(out), **facts, "lost": merged.lost}) if json else out)


def _table(work: "AdapterMerge", facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['method']} of {facts['adapters']} adapters for {facts['base_model']}: {facts['matrices']} matrices"
    ]
    for source, adapter in zip(work.config.sources, work.adapters, strict=True):
        ranks = sorted({len(delta.a) for delta in adapter.deltas.values()})
        rank = " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
        lines.append(f"{source}: {len(adapter.deltas)} matrices, rank {rank}")
    return "\n".join(lines)
