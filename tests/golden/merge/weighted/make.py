"""Makes the folders beside it, small adapters that PEFT wrote, and peft.safetensors: what PEFT makes of several.

Run with an environment that has peft, transformers and torch 2.13.0:

    OMP_NUM_THREADS=1 python tests/golden/merge/weighted/make.py

The base is that of tests/golden/merge/adapters. For every case `a/CASE/MODULE` and `b/CASE/MODULE` are the factors of
the merged adapter, by the names of PEFT's modules, in the order in which PEFT has them also for the embedding; and
`masks/CASE/MODULE/N` what the random ones drew, in order.
"""

import importlib.util
import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
SEED = 2406
spec = importlib.util.spec_from_file_location("adapters_make", HERE.parent / "adapters/make.py")
adapters_make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adapters_make)

# Scale 1 but for `strong`. `other` reaches fewer and other modules.
ADAPTERS = {
    "one": LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "two": LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "other": LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "strong": LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "thin": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
}
FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
DELTAS = ["svd", *(f"{name}_svd" for name in FACTORS[1:])]


def case(method, adapters=("one", "two", "other"), weights=(0.7, 0.4, -0.5), **more):
    sparse = {"density": 0.4} if method not in ("linear", "cat", "svd") else {}
    return {"combination_type": method, "adapters": list(adapters), "weights": list(weights), **sparse, **more}


CASES = {
    **{name: case(name) for name in ("cat", *FACTORS, *DELTAS)},
    "ties-frequency": case("ties", majority_sign_method="frequency"),
    "ties-dense": case("ties", density=1.0),
    "linear-strong": case("linear", ("one", "strong"), (0.5, 0.25)),
    "cat-strong": case("cat", ("one", "strong"), (0.5, 0.25)),
    "svd-strong": case("svd", ("one", "strong"), (0.5, 0.25)),
    "ties-strong": case("ties", ("one", "two", "strong"), (0.5, 0.25, 0.75)),
    "ties_svd-strong": case("ties_svd", ("one", "two", "strong"), (0.5, 0.25, 0.75)),
    "cat-thin": case("cat", ("one", "thin"), (0.5, -2.0)),
    "svd-thin": case("svd", ("one", "thin"), (0.5, -2.0), svd_rank=2),
}


class Recorded:
    """torch.bernoulli that remembers what it answered."""

    def __init__(self):
        self.draw, self.answers = torch.bernoulli, []

    def __call__(self, probabilities):
        self.answers.append(self.draw(probabilities))
        return self.answers[-1]


def merged(model, settings):
    """The merged adapter's factors by module, and the masks of each module."""
    masks, original = {}, {}
    kind = type(model.base_model)
    for name in ("_generalized_task_arithmetic_weighted_adapter", "_svd_generalized_task_arithmetic_weighted_adapter"):
        original[name] = getattr(kind, name)

        def recording(self, *args, _real=original[name], **kwargs):
            target = next(a for a in args if hasattr(a, "lora_A"))
            torch.bernoulli = recorded = Recorded()
            try:
                return _real(self, *args, **kwargs)
            finally:
                torch.bernoulli = recorded.draw
                masks[id(target)] = recorded.answers

        setattr(kind, name, recording)
    torch.manual_seed(SEED)
    try:
        model.add_weighted_adapter(adapter_name="merged", **settings)
    finally:
        for name, function in original.items():
            setattr(kind, name, function)
    factors, drawn = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "merged" in module.scaling:
            assert module.scaling["merged"] == 1
            plain = "merged" in module.lora_A
            a = module.lora_A["merged"].weight if plain else module.lora_embedding_A["merged"]
            b = module.lora_B["merged"].weight if plain else module.lora_embedding_B["merged"]
            short = name.removeprefix("base_model.model.")
            factors[short] = (a.detach().clone().contiguous(), b.detach().clone().contiguous())
            drawn[short] = masks.get(id(module), [])
    model.delete_adapter("merged")
    return factors, drawn


def main():
    warnings.simplefilter("ignore")
    model = None
    for number, (name, config) in enumerate(ADAPTERS.items()):
        if model is None:
            model = get_peft_model(adapters_make.base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        draw = torch.Generator().manual_seed(SEED + number)
        with torch.no_grad():
            for key, parameter in sorted(model.named_parameters()):
                if f".{name}." in key or key.endswith(f".{name}"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    for name in ADAPTERS:
        shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE, save_embedding_layers=False)
    (HERE / "README.md").unlink(missing_ok=True)
    tensors = {}
    for name, settings in CASES.items():
        factors, drawn = merged(model, settings)
        for module, (a, b) in factors.items():
            tensors |= {f"a/{name}/{module}": a, f"b/{name}/{module}": b}
            masks = {f"masks/{name}/{module}/{i}": mask.to(torch.uint8) for i, mask in enumerate(drawn[module])}
            tensors |= masks
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    save_file(tensors, HERE / "peft.safetensors", {**versions, "cases": json.dumps(CASES)})
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)
    print(len(tensors), (HERE / "peft.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
