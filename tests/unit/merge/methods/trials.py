"""Small tensors to merge, and a short way to merge them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge

patient = settings(deadline=None)  # the first call of a process loads libraries, and neighbours may be busy
seeds = st.integers(0, 2**32)
shapes = st.one_of(
    st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 24)), st.just((2, 3, 5)), st.just(())
)

# What each method needs to run, and a choice under which everything in it has work to do.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 0.7, "density": 0.5, "rescale": True},
    "dare_linear": {"weight": 0.7, "density": 0.5},
    "dare_ties": {"weight": 0.7, "density": 0.5},
    "breadcrumbs": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "della_linear": {"weight": 0.7, "density": 0.5},
    "della": {"weight": 0.7, "density": 0.5},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.3},
    "ramplus_tl": {"epsilon": 0.3},
    "model_stock": {},
    "nearswap": {"t": 0.3},
    "karcher": {},
    "arcee_fusion": {},
    "passthrough": {"scale": 0.5},
    "ema": {"mu": 0.3},
    "warp_slerp": {},
    "liti": {},
    "warp": {},
}


def normal(seed: int, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale


def model_count(name: str) -> int:
    """As many models as the method takes, three at most."""
    return min(3, METHODS[name].models[1] or 3)


def run(
    name: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    per_model: Sequence[Mapping[str, Any]] = (),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    block: int = 1 << 18,
    **shared: Any,
) -> Tensor:
    """Merge with one of the METHODS; parameters in `shared` hold for all models."""
    method = METHODS[name]
    settings = bind(method, shared, per_model or [{}] * len(models), seed=seed)
    out = torch.full_like(models[0], torch.nan, dtype=dtype)
    merge(method, Whole(tuple(models), base, block=block), settings, out)
    return out


def random_run(name: str, seed: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    """Merge random models of a shape and type with the parameters above."""
    base = None if METHODS[name].base == "none" else normal(seed, shape).to(dtype)
    models = [normal(seed + 1 + i, shape).to(dtype) for i in range(model_count(name))]
    return run(name, models, base, seed=seed, **PARAMETERS[name], **more)
