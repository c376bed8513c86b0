"""Makes mergekit.safetensors: what mergekit makes of small tensors, for tests/parity/test_merge_methods.py.

Run with an environment that has mergekit 0.1.5 and torch 2.13.0:

    OMP_NUM_THREADS=1 python tests/golden/merge/make.py

The file holds the inputs of every case (base, a, b, c), the results in float32 for every configuration, for bfloat16
cases also those that mergekit computes in bfloat16, and the masks and probabilities that the random methods drew.
Versions, seed and configurations are in its metadata.

mergekit sorts without saying what happens to equal magnitudes. Here its sorts are made stable, so that the earlier
of equal ones counts as the larger.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file

SEED = 2406
FILE = Path(__file__).with_name("mergekit.safetensors")
AB, ABC = ["a", "b"], ["a", "b", "c"]


def config(name, method, models, base=None, per_model=None, **shared):
    return {
        "id": name,
        "method": method,
        "models": models,
        "base": base,
        "per_model": per_model or {},
        "shared": shared,
    }


def weighted(*weights, **more):
    return {"weight": list(weights), **more}


def task(name, method, models, per_model, **shared):
    return config(name, method, models, "base", per_model, **shared)


CONFIGS = [
    config("linear", "linear", ABC, per_model=weighted(0.2, 0.5, 1.1)),
    config("linear-sum", "linear", AB, per_model=weighted(0.3, -0.6), normalize=False),
    config("linear-one", "linear", ["a"], per_model=weighted(1.0)),
    config("passthrough", "passthrough", ["a"]),
    config("passthrough-scale", "passthrough", ["a"], per_model={"scale": [0.5]}),
    config("slerp", "slerp", ["b"], "a", t=0.3),
    config("slerp-0", "slerp", ["b"], "a", t=0.0),
    config("slerp-1", "slerp", ["b"], "a", t=1.0),
    config("nuslerp", "nuslerp", AB, per_model=weighted(1.0, 3.0)),
    config("nuslerp-base", "nuslerp", AB, "base", weighted(1.0, 3.0)),
    config("nuslerp-half", "nuslerp", AB, "base", weighted(0.5, -0.5)),
    config("nuslerp-rows", "nuslerp", AB, "base", weighted(0.4, 0.6), nuslerp_flatten=False),
    config("nuslerp-columns", "nuslerp", AB, "base", weighted(0.4, 0.6), nuslerp_flatten=False, nuslerp_row_wise=True),
    config("multislerp", "multislerp", ABC, per_model=weighted(0.2, 0.5, 0.9)),
    config("multislerp-base", "multislerp", ABC, "base", weighted(0.2, 0.5, 0.9)),
    config("multislerp-two", "multislerp", AB, "base", weighted(1.0, 1.0)),
    config("multislerp-sum", "multislerp", ABC, per_model=weighted(0.2, 0.5, 0.9), normalize_weights=False),
    config("karcher", "karcher", ABC),
    config("karcher-two", "karcher", AB, max_iter=3),
    config("model_stock", "model_stock", ABC, "base"),
    config("model_stock-rows", "model_stock", ABC, "base", filter_wise=True),
    config("nearswap", "nearswap", ["a"], "base", t=0.2),
    config("arcee_fusion", "arcee_fusion", ["a"], "base"),
    config("sce", "sce", ABC, "base"),
    config("sce-some", "sce", ABC, "base", select_topk=0.4),
    config("ram", "ram", ABC, "base", epsilon=0.1),
    config("ram-default", "ram", AB, "base"),
    config("ramplus_tl", "ramplus_tl", ABC, "base", epsilon=0.2, r=0.5, alpha=0.7),
    task("task_arithmetic", "task_arithmetic", AB, weighted(0.7, 0.4)),
    task("task_arithmetic-mean", "task_arithmetic", AB, weighted(0.7, 0.4), normalize=True, **{"lambda": 0.5}),
    task("ties", "ties", ABC, weighted(0.5, 1.0, 0.7, density=[0.5, 0.3, 0.9])),
    task("ties-one", "ties", ["a"], weighted(1.0)),
    task("ties-signs", "ties", ABC, weighted(0.5, -1.0, 0.7, density=[0.5, 0.5, 0.5]), int8_mask=True),
    task("ties-sum", "ties", AB, weighted(0.5, 1.0, density=[0.6, 0.6]), normalize=False, rescale=True),
    task("ties-none", "ties", AB, weighted(0.5, 1.0, density=[0.0, 0.6]), **{"lambda": 1.5}),
    task("breadcrumbs", "breadcrumbs", AB, weighted(0.5, 1.0, density=[0.5, 0.9], gamma=[0.1, 0.3])),
    task("breadcrumbs_ties", "breadcrumbs_ties", AB, weighted(0.5, 1.0, density=[0.5, 0.7], gamma=[0.05, 0.01])),
    task("dare_linear", "dare_linear", AB, weighted(0.5, 1.0, density=[0.5, 0.7])),
    task("dare_ties", "dare_ties", ABC, weighted(0.5, 1.0, 0.7, density=[0.5, 0.7, 1.0])),
    task("dare-plain", "dare_linear", AB, weighted(0.5, 1.0, density=[0.5, 0.7]), rescale=False),
    task("della_linear", "della_linear", AB, weighted(0.5, 1.0, density=[0.5, 0.7])),
    task("della", "della", ABC, weighted(0.5, 1.0, 0.7, density=[0.5, 0.7, 0.4], epsilon=[0.2, 0.1, 0.3])),
]


def cases():
    """Name of a case to float32 or bfloat16 [4, ...]: base, a, b, c."""
    draw = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(4, *shape, generator=draw)

    plain = normal(12, 20)
    plain[1:] = plain[0] + 0.5 * plain[1:]
    related = normal(8, 12)
    related[1:] = related[0] + 0.01 * related[1:]
    zero = normal(6, 10)
    zero[1] = zero[0]  # a zero task vector
    zero[2] = 0  # a zero tensor
    zero[3, 2] = zero[0, 2]
    # Multiples of 1/64, so that sums and products below are exact.
    grid = (normal(6, 10) * 64).round() / 64
    parallel = torch.stack([grid[0], grid[0] + grid[1], grid[0] + 2 * grid[1], grid[0] + 4 * grid[1]])
    through_zero = torch.stack([0 * grid[0], grid[1], 2 * grid[1], 4 * grid[1]])
    opposite = torch.stack([grid[0], grid[0] + grid[1], grid[0] - grid[1], grid[0] + grid[2]])
    opposite_zero = torch.stack([0 * grid[0], grid[1], -grid[1], grid[2]])
    ties = torch.randint(-3, 4, (4, 12, 20), generator=draw) / 8
    ties[0] = 0
    return {
        "float32": plain,
        "related": related,
        "bfloat16": plain.bfloat16(),
        "vector": normal(30),
        "single": normal(1),
        "zero": zero,
        "parallel": parallel,
        "parallel-zero": through_zero,
        "opposite": opposite,
        "opposite-zero": opposite_zero,
        "ties": ties,
    }


class Recorded:
    """torch.bernoulli that remembers what it was asked and what it answered."""

    def __init__(self):
        self.draw = torch.bernoulli
        self.asked, self.answers = [], []

    def __call__(self, probabilities):
        answer = self.draw(probabilities)
        self.asked.append(probabilities.float())
        self.answers.append(answer.to(torch.uint8))
        return answer


def stable_argsort(values, dim=-1, descending=False):
    return plain_argsort(values, dim=dim, descending=descending, stable=True)


def stable_sort(values, dim=-1, descending=False):
    assert not descending
    indices = plain_argsort(values, dim=dim, descending=True, stable=True).flip(dim)
    return torch.return_types.sort((values.gather(dim, indices), indices))


def stable_topk(values, k, largest):
    assert largest
    indices = plain_argsort(values, descending=True, stable=True)[:k]
    return torch.return_types.topk((values[indices], indices))


plain_argsort = torch.argsort
torch.argsort, torch.sort, torch.topk = stable_argsort, stable_sort, stable_topk


def merged(configuration, tensors, dtype):
    names = [*([configuration["base"]] if configuration["base"] else []), *configuration["models"]]
    base = 0 if configuration["base"] else None
    per_model = {
        name: dict(zip(configuration["models"], values, strict=True))
        for name, values in configuration["per_model"].items()
    }
    rows = dict(zip(["base", "a", "b", "c"], tensors, strict=True))
    return merge_tensors(
        [rows[name] for name in names],
        configuration["method"],
        parameters={**configuration["shared"], **per_model},
        ids=names,
        base_index=base,
        dtype=dtype,
    )


def main():
    tensors, errors = {}, {}
    for case, inputs in cases().items():
        tensors[f"inputs/{case}"] = inputs
        for configuration in CONFIGS:
            where = f"{configuration['id']}/{case}"
            torch.manual_seed(SEED)
            torch.bernoulli = recorded = Recorded()
            try:
                result = merged(configuration, inputs, torch.float32)
            except (RuntimeError, ValueError) as error:
                errors[where] = str(error).splitlines()[0][:80]
                continue
            finally:
                torch.bernoulli = recorded.draw
            assert result.dtype == torch.float32
            tensors[f"float32/{where}"] = result.clone()
            for i, (asked, answer) in enumerate(zip(recorded.asked, recorded.answers, strict=True)):
                tensors[f"masks/{where}/{i}"] = answer.reshape(inputs.shape[1:]).clone()
                if "della" in where:
                    tensors[f"chances/{where}/{i}"] = asked.reshape(inputs.shape[1:]).clone()
            if inputs.dtype == torch.bfloat16 and not recorded.asked:
                tensors[f"bfloat16/{where}"] = merged(configuration, inputs, torch.bfloat16).clone()
    metadata = {
        "mergekit": version("mergekit"),
        "torch": torch.__version__,
        "seed": str(SEED),
        "configs": json.dumps(CONFIGS),
        "errors": json.dumps(errors),
    }
    save_file(tensors, FILE, metadata)
    print(len(tensors), FILE.stat().st_size)
    for where, error in errors.items():
        print(where, "|", error)


if __name__ == "__main__":
    main()
