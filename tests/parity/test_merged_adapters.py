"""Adapters merged with each other equal what PEFT's add_weighted_adapter makes of them, by every name that it has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.adapter_merge import MergedAdapter, merge_adapters
from cabochon.merge.adapter_methods import COMBINATIONS
from cabochon.merge.methods import sparsify
from cabochon.merge.methods.method import filled, tensor_seed
from cabochon.model.config import Gemma2Config
from cabochon.weights.adapters import Adapter, read_adapter
from cabochon.weights.names import from_hf, to_hf

GOLDEN = Path(__file__).parents[1] / "golden/merge/weighted"
with safe_open(GOLDEN / "peft.safetensors", "pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    CASES: dict[str, dict[str, Any]] = json.loads(file.metadata()["cases"])
with safe_open(GOLDEN.parent / "adapters/peft.safetensors", "pt") as file:
    described = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    CONFIG = Gemma2Config.from_hf(described | json.loads(file.metadata()["config"]))
EMBEDDING = "embedding.weight"


def adapters(case: dict[str, Any]) -> list[Adapter]:
    return [read_adapter(GOLDEN / name, CONFIG) for name in case["adapters"]]


def golden(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's factors a and b, by our names, each as in a linear layer."""
    found = {}
    for key, a in TENSORS.items():
        kind, case, module = key.split("/")[:3]
        if (kind, case) == ("a", name):
            b, ours = TENSORS[f"b/{name}/{module}"], from_hf(f"{module}.weight")
            found[ours] = (b.T, a.T) if ours == EMBEDDING else (a, b)
    return found


def merged(name: str, monkeypatch: pytest.MonkeyPatch) -> MergedAdapter:
    """Ours, with the masks that PEFT drew."""
    case = CASES[name]
    per_model = [{"weight": w} for w in case["weights"]]
    combination = COMBINATIONS[case["combination_type"]]
    if combination.sparsifier:
        per_model = [own | {"density": case["density"]} for own in per_model]
    shared = {"rank": case["svd_rank"]} if "svd_rank" in case else {}
    seeds: dict[int, tuple[str, int]] = {}

    def settings(matrix: str, places: Any) -> Any:
        seed = tensor_seed(0, to_hf(matrix))
        # PEFT draws for all A first. Of an embedding its A is our b.
        first, second = ("b", "a") if matrix == EMBEDDING else ("a", "b")
        drawn = {"": 0, first: 0, second: len(places)}
        seeds.update({tensor_seed(seed, part): (matrix, start) for part, start in drawn.items()})
        return filled(combination.name, combination.parameters, shared, [per_model[i] for i in places], seed=seed)

    def chosen(values: Tensor, start: int, seed: int, model: int, probability: float) -> Tensor:
        matrix, first = seeds[seed]
        answer = TENSORS[f"masks/{name}/{to_hf(matrix).removesuffix('.weight')}/{first + model}"]
        turned = matrix == EMBEDDING and not combination.product
        return values * (answer.T if turned else answer).reshape(values.shape).bool()

    monkeypatch.setattr(sparsify, "by_chance", chosen)
    majority = case.get("majority_sign_method", "total")
    return merge_adapters(adapters(case), combination, settings, majority=majority)


@pytest.mark.parametrize("name", CASES)
def test_merged_adapters_are_pefts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = merged(name, monkeypatch), golden(name)
    assert found.factors.keys() == expected.keys()
    combination = COMBINATIONS[CASES[name]["combination_type"]]
    for matrix, (a, b) in expected.items():
        if not combination.cuts and combination.name != "cat":
            torch.testing.assert_close(found.factors[matrix].a, a, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.factors[matrix].b, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.delta(matrix), b @ a, rtol=1e-4, atol=1e-5)


def test_every_name_of_peft_is_held_to_it() -> None:
    assert {case["combination_type"] for case in CASES.values()} == COMBINATIONS.keys()
    with safe_open(GOLDEN / "peft.safetensors", "pt") as file:
        assert file.metadata()["peft"] == "0.21.2"


def test_ranks_have_to_agree_where_factors_are_merged_apart() -> None:
    both = [read_adapter(GOLDEN / name, CONFIG) for name in ("one", "thin")]
    for name, hint in (("linear", "use cat, or svd"), ("ties", "use cat, or ties_svd")):
        combination = COMBINATIONS[name]
        with pytest.raises(BadInput) as caught:
            merge_adapters(
                both,
                combination,
                lambda _, p, c=combination: filled(c.name, c.parameters, {"weight": 1.0}, [{}] * len(p)),
            )
        assert hint in str(caught.value) and "q_proj" in caught.value.what
