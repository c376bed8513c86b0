"""`cabochon doctor`: what this machine has, which attention is exact on it, and what would run best."""

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING

from cabochon.cli.options import Json
from cabochon.model.config import PRESETS, Gemma2Config

if TYPE_CHECKING:
    from cabochon.base.machine import Machine

GIB = 2**30
READING_SPEED = 5  # tokens per second
FORMS = {"bf16": 16, "int8": 8, "int4": 4.375}  # bits of a weight; int4 with a scale and a zero for each group of 64


def doctor(*, json: Json = False) -> int:
    """Check this machine: its hardware, and every attention backend against an oracle.

    Exit code 1 when a backend that would be chosen here fails its proof.

    Example: cabochon doctor
    """
    from cabochon.base.machine import inspect

    machine = inspect()
    device = "cuda" if machine.has_gpu else "cpu"
    proofs = prove_all(device)
    sizes = {
        f"{name} {form}": run_estimate(machine, Gemma2Config.preset(name), bits)
        for name in PRESETS
        for form, bits in FORMS.items()
    }
    if json:
        print(json_format.dumps({"machine": asdict(machine), "attention": proofs, "sizes": sizes}))
    else:
        _print(machine, device, proofs, sizes)
    needed = ("flex", "blockwise") if machine.has_gpu else ("plain", "blockwise", *({"kernel"} & set(proofs)))
    return int(any(proofs[name][dtype] for name in needed for dtype in proofs[name]))


def prove_all(device: str) -> dict[str, dict[str, list[str]]]:
    """For each backend and dtype the features it gets wrong on a device; an empty list is a pass."""
    import warnings

    import torch

    from cabochon.model.attention import BACKENDS
    from cabochon.model.kernels import cuda
    from cabochon.model.kernels.attend import as_backend
    from cabochon.model.kernels.native import library
    from cabochon.model.proof import failures

    backends = dict(BACKENDS)
    if device == "cpu" and library() is not None:
        backends["kernel"] = as_backend
    elif device == "cuda":
        del backends["native"]
        if cuda.present():
            from cabochon.model.kernels.cuda.attend import as_backend as on_gpu

            backends["kernel"] = on_gpu

    def judge(name: str, dtype: torch.dtype) -> list[str]:
        kinds = {"with_softcap": name != "sdpa", "whole_texts_only": name == "kernel"}
        return failures(backends[name], device, dtype, **kinds)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention complains about its own eager form
        dtypes = (torch.float32, torch.bfloat16)
        return {name: {str(d).removeprefix("torch."): judge(name, d) for d in dtypes} for name in backends}


def run_estimate(machine: "Machine", config: Gemma2Config, bits: float) -> dict[str, float | bool | str]:
    """Whether a model fits with so many bits a weight, and the most tokens per second that memory reads allow.

    Every token reads every weight once; a cache of one full conversation has to fit beside them.
    """
    memory = machine.gpu_memory or machine.free_memory
    weights = config.num_parameters * bits / 8
    need = weights + config.cache_bytes(config.max_position)
    return {
        "needs_gib": round(need / GIB, 2),
        "fits": need < 0.95 * memory,
        "tokens_per_second_at_most": round(machine.read_bandwidth / weights, 1),
    }


def recommend(sizes: dict[str, dict[str, float | bool | str]]) -> str:
    """The largest model, in its most exact form, that fits and can be read along with; else the smallest that fits."""
    fits = [name for name, told in sizes.items() if told["fits"] and not name.startswith("tiny")]
    brisk = [name for name in fits if float(sizes[name]["tokens_per_second_at_most"]) >= READING_SPEED]
    if not fits:
        return "the model that ships inside"
    if not brisk:
        return f"Gemma 2 {min(fits, key=lambda name: float(sizes[name]['needs_gib']))}"
    size = brisk[-1].split()[0]
    return f"Gemma 2 {next(name for name in brisk if name.startswith(size))}"


def _print(
    machine: "Machine",
    device: str,
    proofs: dict[str, dict[str, list[str]]],
    sizes: dict[str, dict[str, float | bool | str]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from cabochon.model.kernels.native import why_not

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("processor", f"{machine.processor}, {machine.cores} cores for this process")
    facts.add_row("instructions", ", ".join(machine.instruction_sets) or "none that matter were found")
    facts.add_row("memory", f"{machine.memory / GIB:.1f} GiB, {machine.free_memory / GIB:.1f} free")
    facts.add_row("kernels", why_not() or "compiled, in use")
    facts.add_row("GPU", f"{', '.join(machine.gpus)}, {machine.gpu_memory / GIB:.0f} GiB" if machine.gpus else "none")
    facts.add_row("bandwidth", f"{machine.read_bandwidth / 1e9:.0f} GB/s of reads, measured just now")

    attention = Table("attention", "float32", "bfloat16", "used", title=f"against the oracle, on {device}")
    for name, found in proofs.items():
        verdicts = [f"wrong: {', '.join(wrong)}" if wrong else "exact" for wrong in found.values()]
        attention.add_row(name, *verdicts, _USED[name])

    models = Table("model", "weights and cache", "fits", "tokens/s at most", title="what runs here")
    for name, told in sizes.items():
        fits = "yes" if told["fits"] else "no"
        models.add_row(name, f"{told['needs_gib']:g} GiB", fits, _rate(float(told["tokens_per_second_at_most"])))
    console = Console()
    for table in (facts, attention, models):
        console.print(table)
    console.print(f"best here: {recommend(sizes)}, on {device}")


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.1f}"


_USED = {
    "plain": "short prompts and single tokens",
    "blockwise": "long prompts on a CPU without the kernel, and training",
    "native": "training on a CPU",
    "kernel": "answering",
    "flex": "training on a GPU",
    "sdpa": "only with the soft cap turned off",
}
