"""Adapters beside frozen layers, against plain autograd over the matrix that they stand for."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from cabochon.base.errors import UsageError
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import Linear, PackedWeight, QuantLinear, matrix, quantize
from cabochon.model.lora import LoraConfig, LoraLinear, adapter_parameters, adapters, attach, detach, merge
from cabochon.model.lossless import LosslessLinear
from cabochon.weights.quantize import quantize_layers
from support import SMALL, random_ids, relative_error, small_model

IDS, PROBE = random_ids(SMALL, 2, 13), torch.randn(2, 13, SMALL.vocab_size, generator=torch.Generator().manual_seed(3))
KINDS = {
    "LoRA": LoraConfig(rank=3, alpha=5),
    "rsLoRA": LoraConfig(rank=5, alpha=2, rslora=True, targets=("q_proj", "up_proj")),
    "DoRA": LoraConfig(rank=4, dora=True),
}
kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
forms = pytest.mark.parametrize("bits", [0, 8, 4], ids=["float", "int8", "int4"])


def model_of(bits: int = 0, dtype: torch.dtype = torch.float32) -> Gemma2:
    model = small_model(size=0.2).to(dtype)
    if bits:
        quantize_layers(model, bits)
    return model


def trained(model, config, size=0.1):
    """As if the adapters had been trained."""
    attach(model, config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return model


def gradients(model):
    return {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


def explicit(w, a, b, scale, magnitude):
    """The matrix of an adapted layer, in reach of autograd."""
    v = w + scale * b @ a
    return v if magnitude is None else v * (magnitude / v.detach().norm(dim=1))[:, None]


# One layer


@st.composite
def layers(draw):
    n, k, rank = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.integers(1, 9))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    w, a, b = (torch.randn(shape, generator=noise) for shape in ((n, k), (rank, k), (n, rank)))
    bits = draw(st.sampled_from([0, 8, 4]))
    base = QuantLinear(n, k, bits) if bits else Linear(k, n)
    if bits:
        base.fill(quantize(w, bits))
        base.exact = True
    else:
        base.weight = torch.nn.Parameter(w, requires_grad=False)
    magnitude = torch.rand(n, generator=noise) + 0.5 if draw(st.booleans()) else None
    layer = LoraLinear(base, a, b, alpha=draw(st.floats(0.1, 9)), rslora=draw(st.booleans()), magnitude=magnitude)
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    return layer, torch.randn(*batch, k, generator=noise)


@settings(deadline=None)
@given(layers())
def test_a_layer_is_the_matrix_that_it_stands_for(drawn):
    layer, x = drawn
    layer, x = layer.double(), x.double().requires_grad_()
    parts = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters(recurse=False)}
    w = matrix(layer.base, torch.float64)
    scale = layer.alpha / (math.sqrt(layer.rank) if layer.rslora else layer.rank)
    z = x.detach().clone().requires_grad_()
    expected = linear(z, explicit(w, parts["a"], parts["b"], scale, parts.get("magnitude")))
    probe = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    out = layer(x)
    (expected * probe).sum().backward()
    (out * probe).sum().backward()
    near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    near(out, expected)
    near(x.grad, z.grad)
    for name, part in parts.items():
        near(layer.get_parameter(name).grad, part.grad)
    near = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)  # float32, and rows that nearly cancel
    near(layer.merged(torch.float64), explicit(w, parts["a"], parts["b"], scale, parts.get("magnitude")).detach())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layer_keeps_nothing_of_its_size(bits):
    layer = QuantLinear(96, 128, bits)
    layer.fill(quantize(torch.randn(96, 128), bits))
    layer.exact = True
    adapted = LoraLinear(layer, torch.randn(2, 128), torch.randn(96, 2), alpha=1, magnitude=torch.ones(96))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        adapted(torch.randn(3, 128, requires_grad=True)).sum()
    assert kept
    assert max(kept) <= 3 * 128


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_products_have_a_gradient_and_the_same_values_with_it(bits):
    w, x = torch.randn(40, 70), torch.randn(5, 70)
    layer = QuantLinear(40, 70, bits)
    layer.fill(quantize(w, bits))
    wanted = x.clone().requires_grad_()
    out = layer(wanted)
    assert torch.equal(out, layer(x))
    probe = torch.randn(5, 40)
    (out * probe).sum().backward()
    torch.testing.assert_close(wanted.grad, probe @ matrix(layer, torch.float32))


# A whole model


@forms
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_is_unchanged_and_merged_is_the_base(bits, config, dtype):
    model = model_of(bits, dtype)
    plain = copy.deepcopy(model)
    merge(plain)
    expected, weights = plain(IDS), plain.state_dict()
    attach(model, config)
    assert torch.equal(model(IDS), expected)
    merge(model)
    assert not adapters(model)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in small_model().named_modules()
    }
    after = model.state_dict()
    assert after.keys() == weights.keys()
    for name, tensor in weights.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor)
    assert all(parameter.requires_grad for parameter in model.parameters())


@forms
@kinds
def test_gradients_are_those_of_plain_autograd(bits, config):
    model = trained(model_of(bits), config)
    (model(IDS) * PROBE).sum().backward()
    leaves, weights = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            parts = {part: p.detach().double().requires_grad_() for part, p in module.named_parameters(recurse=False)}
            leaves |= {f"{name}.{part}": p for part, p in parts.items()}
            w = matrix(module.base, torch.float64)
            weights[f"{name}.weight"] = explicit(w, parts["a"], parts["b"], module.scale, parts.get("magnitude"))
        elif isinstance(module, Linear | QuantLinear) and not name.endswith(".base"):
            weights[f"{name}.weight"] = matrix(module, torch.float64)
    others = {name: p.double() for name, p in model.named_parameters() if "norm" in name or "embedding" in name}
    expected = functional_call(Gemma2(SMALL).double(), weights | others, (IDS,))
    (expected * PROBE).sum().backward()
    assert gradients(model).keys() == leaves.keys()
    for name, gradient in gradients(model).items():
        assert leaves[name].grad.abs().max() > 0
        assert relative_error(gradient, leaves[name].grad) < 1e-4, name


@forms
@kinds
def test_merged_is_attached(bits, config):
    model = trained(model_of(bits), config)
    expected = model(IDS)
    assert relative_error(expected, model_of(bits)(IDS)) > 0.1
    merge(model)
    assert relative_error(model(IDS), expected) < 1e-4


@forms
@kinds
def test_only_adapters_learn(bits, config):
    model = model_of(bits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, config)
    learnt = adapter_parameters(model)
    assert sum(p.numel() for p in learnt.values()) == config.num_parameters(SMALL)
    optimizer = torch.optim.AdamW(learnt.values(), lr=3e-2)
    losses = []
    for _ in range(6):
        logits = model(IDS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learnt.keys()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnt)
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # as before, down to the kernels that quantised layers use
    assert torch.equal(model(IDS), model_of(bits)(IDS))
    assert all(not module.exact for module in model.modules() if isinstance(module, PackedWeight))


@forms
@kinds
def test_checkpointing_changes_no_gradient(bits, config):
    first = trained(model_of(bits), config)
    second = copy.deepcopy(first)
    for block in second.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for model in (first, second):
        (model(IDS) * PROBE).sum().backward()
    for name, gradient in gradients(first).items():
        assert torch.equal(gradient, gradients(second)[name])


@forms
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains_float32_adapters(bits, config, dtype):
    exact, mixed = (trained(model_of(bits, dtype).float(), config, 0.02), trained(model_of(bits, dtype), config, 0.02))
    (exact(IDS) * PROBE).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        logits = mixed(IDS)
    (logits * PROBE).sum().backward()
    assert relative_error(logits, exact(IDS)) < 0.1
    for name, gradient in gradients(mixed).items():
        assert gradient.dtype is torch.float32
        expected = gradients(exact)[name]
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.97, name


def test_small_changes_of_a_length_are_not_lost_in_bfloat16():
    layer = Linear(64, 8).bfloat16()
    magnitude = layer.weight.detach().float().norm(dim=1)
    adapted = LoraLinear(layer, torch.zeros(1, 64), torch.zeros(8, 1), alpha=1, magnitude=magnitude * 1.003)
    x = torch.randn(500, 64).bfloat16()
    grown = adapted(x).float().norm() / layer(x).float().norm()
    assert abs(grown - 1.003) < 5e-4  # a factor of 1.003 would be 1 in bfloat16


def test_dropout_is_for_the_adapter_alone_while_training():
    model = small_model()
    expected = model(IDS)
    attach(model, LoraConfig(rank=2, dropout=0.5))
    model.train()
    assert torch.equal(model(IDS), expected)  # B is 0
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.b.add_(0.1)
    torch.manual_seed(5)
    first = model(IDS)
    assert not torch.equal(model(IDS), first)
    torch.manual_seed(5)
    assert torch.equal(model(IDS), first)
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_a_starts_by_its_seed_alone():
    def start(**settings):
        model = small_model()
        torch.manual_seed(settings.pop("global_seed", 0))
        attach(model, LoraConfig(**settings))
        return adapter_parameters(model)

    first, again, other = start(seed=4), start(seed=4, global_seed=9), start(seed=5)
    name = "layers.1.mlp.down.a"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    bound = SMALL.intermediate_size**-0.5
    assert 0.9 * bound < first[name].abs().max() <= bound
    assert first[name].detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_targets_choose_layers():
    model = small_model()
    attach(model, LoraConfig(rank=1, targets=("v_proj", "q", "q_proj")))
    assert list(adapters(model)) == [f"layers.{i}.attention.{kind}" for i in range(SMALL.num_layers) for kind in "qv"]
    assert LoraConfig(targets=("down_proj", "k")).targets == ("k", "down")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": ("gates",)}, "did you mean gate"),
        ({"targets": ("embedding",)}, "there are q, k"),
        ({"targets": ()}, "needs targets"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(UsageError) as refused:
        LoraConfig(**settings)
    assert told in str(refused.value)


def test_models_that_cannot_have_adapters_are_refused():
    model = small_model()
    attach(model, LoraConfig(rank=1))
    with pytest.raises(UsageError, match="has adapters already"):
        attach(model, LoraConfig(rank=1))
    model = small_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            model.set_submodule(name, LosslessLinear(*module.weight.shape))
    with pytest.raises(UsageError) as refused:
        attach(model, LoraConfig(rank=1))
    assert "12 bits" in refused.value.cause
