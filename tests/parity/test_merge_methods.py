"""Merge methods against mergekit 0.1.5, whose results on small tensors lie in golden/merge beside their script."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cabochon.merge.methods import METHODS, sparsify
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge

FILE = Path(__file__).parents[1] / "golden" / "merge" / "mergekit.safetensors"
ROWS = dict(base=0, a=1, b=2, c=3)


def load() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


GOLDEN, METADATA = load()
CONFIGS = {config["id"]: config for config in json.loads(METADATA["configs"])}
CASES = [name.removeprefix("inputs/") for name in GOLDEN if name.startswith("inputs/")]

# What mergekit does otherwise, and the test below that shows what is done here.
DEPARTURES = {
    **{f"breadcrumbs{kind}/single": "test_breadcrumbs_keeps_small_tensors" for kind in ("", "_ties")},
    **{f"della{kind}/single": "test_della_on_rows_of_one" for kind in ("", "_linear")},
    **{f"nuslerp-columns/opposite{zero}": "test_nuslerp_of_opposite_columns" for zero in ("", "-zero")},
    "sce-some/ties": "test_sce_among_equal_variances",
}


def method_of(config: dict[str, Any]) -> str:
    return str(config["method"])


def ours(config: dict[str, Any], inputs: Tensor, dtype: torch.dtype = torch.float32, block: int = 1 << 18) -> Tensor:
    per_model = [
        {name: values[i] for name, values in config["per_model"].items()} for i in range(len(config["models"]))
    ]
    method = METHODS[config["method"]]
    whole = Whole(
        tuple(inputs[ROWS[name]] for name in config["models"]),
        inputs[ROWS[config["base"]]] if config["base"] else None,
        block=block,
    )
    out = torch.full_like(inputs[0], torch.nan, dtype=dtype)
    merge(method, whole, bind(method, config["shared"], per_model), out)
    return out


@pytest.fixture
def golden_masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Random methods see the masks that mergekit drew; those who keep everything are not asked by either."""
    config, case = CONFIGS[request.node.callspec.params["config"]], request.node.callspec.params["case"]
    where = f"{config['id']}/{case}"
    densities = config["per_model"].get("density", [])
    drawn = [i for i, density in enumerate(densities) if density < 1]

    def chosen(values: Tensor, start: int, seed: int, model: int, probability: float | Tensor) -> Tensor:
        part = slice(start, start + values.numel())
        if isinstance(probability, Tensor):
            chances = GOLDEN[f"chances/{where}/{drawn.index(model)}"].reshape(-1)[part]
            torch.testing.assert_close(probability, chances.view(values.shape))
        return values * GOLDEN[f"masks/{where}/{drawn.index(model)}"].reshape(-1)[part].view(values.shape).bool()

    monkeypatch.setattr(sparsify, "by_chance", chosen)
    return where


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_mergekit(config: str, case: str, golden_masks: str) -> None:
    if golden_masks in DEPARTURES:
        assert DEPARTURES[golden_masks] in globals()
        return
    expected = GOLDEN[f"float32/{golden_masks}"]
    for block in (1, 1 << 18):
        got = ours(CONFIGS[config], GOLDEN[f"inputs/{case}"], block=block)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_every_method_of_mergekit_is_held_to_it() -> None:
    own = {"ema", "warp_slerp", "liti", "warp"}
    assert {config["method"] for config in CONFIGS.values()} == METHODS.keys() - own
    assert len(METHODS) == 24
    assert METADATA["mergekit"] == "0.1.5"


def test_errors_of_mergekit_are_known_departures() -> None:
    assert set(json.loads(METADATA["errors"])) <= DEPARTURES.keys()


# mergekit computes in the type of the models. Rounding to bfloat16 in between moves values by a few of its steps, and
# methods that select can select otherwise: those are compared in float32 only.
SELECTING = "sce ram ramplus_tl arcee_fusion ties breadcrumbs breadcrumbs_ties della della_linear dare_ties".split()


@pytest.mark.parametrize("config", [c for c in CONFIGS if f"bfloat16/{c}/bfloat16" in GOLDEN])
def test_near_what_mergekit_makes_in_bfloat16(config: str) -> None:
    method = CONFIGS[config]["method"]
    if method in SELECTING:
        return
    expected = GOLDEN[f"bfloat16/{config}/bfloat16"]
    got = ours(CONFIGS[config], GOLDEN["inputs/bfloat16"], torch.bfloat16)
    exact = method in ("linear", "slerp", "passthrough")
    torch.testing.assert_close(got, expected, rtol=2**-7 if exact else 2**-5, atol=1e-6 if exact else 2**-5)


# Departures


def single(config: str) -> tuple[dict[str, Any], Tensor]:
    return CONFIGS[config], GOLDEN["inputs/single"]


@pytest.mark.parametrize("config", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keeps_small_tensors(config: str) -> None:
    """mergekit rounds down to keeping nothing, so that the result is the base."""
    configuration, inputs = single(config)
    assert torch.equal(GOLDEN[f"float32/{config}/single"], inputs[0])
    weights = configuration["per_model"]["weight"]
    deltas = inputs[1:3] - inputs[0]
    if config == "breadcrumbs":
        torch.testing.assert_close(
            ours(configuration, inputs), inputs[0] + weights[0] * deltas[0] + weights[1] * deltas[1]
        )
    else:
        assert not torch.equal(ours(configuration, inputs), inputs[0])


def test_della_on_rows_of_one() -> None:
    """mergekit divides zero by zero; here the one element is kept as often as the density says."""
    errors = json.loads(METADATA["errors"])
    assert {"della/single", "della_linear/single"} == set(errors)
    values = torch.tensor([[3.0], [1.0]])
    assert torch.equal(sparsify.keep_probabilities(values, 0.7, 0.1), torch.full((2, 1), 0.7))


def test_nuslerp_of_opposite_columns() -> None:
    """mergekit takes a straight line in those columns whose cosine happens to be rounded to exactly -1."""
    config, inputs = CONFIGS["nuslerp-columns"], GOLDEN["inputs/opposite"]
    base, a, b, _ = inputs
    line = base + 0.4 * (a - base) + 0.6 * (b - base)
    torch.testing.assert_close(ours(config, inputs), line)
    straight = (GOLDEN["float32/nuslerp-columns/opposite"] - line).abs().amax(0) < 1e-6
    assert straight.any() and not straight.all()


def test_sce_among_equal_variances() -> None:
    """Which of them are selected hangs on the last bit of a variance; here and there it is some of the same."""
    inputs = GOLDEN["inputs/ties"]
    variance = inputs[1:].double().var(0, unbiased=False)
    last = variance.flatten().sort(descending=True).values[int((variance > 0).sum() * 0.4) - 1]
    sure = (variance - last).abs() > 1e-6
    got = ours(CONFIGS["sce-some"], inputs)
    assert not got[sure & (variance < last)].any()
    assert (got[sure & (variance > last)] != 0).any()
    torch.testing.assert_close(got[sure] != 0, GOLDEN["float32/sce-some/ties"][sure] != 0)


def test_sce_weighs_small_changes_too() -> None:
    """mergekit weights models alike when the mean squares of their changes sum to less than 1e-6."""
    base = torch.zeros(1, 50)
    draw = torch.Generator().manual_seed(1)
    large, small = torch.rand(2, 1, 50, generator=draw)
    settings = bind(METHODS["sce"], {}, [{}, {}])

    def merged(scale: float) -> Tensor:
        out = torch.empty_like(base)
        merge(METHODS["sce"], Whole((large * scale, small * scale * 0.1), base), settings, out)
        return out / scale

    torch.testing.assert_close(merged(1e-4), merged(1.0))
