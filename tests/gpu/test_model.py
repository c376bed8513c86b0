"""The network on a GPU against the same on the CPU and against transformers."""

import dataclasses
import warnings

import pytest
import torch

from cabochon.model.attention import BACKENDS, attention, plain
from cabochon.model.proof import failures
from cabochon.model.visibility import Visibility
from support import SMALL, random_ids, reference_model, relative_error

pytestmark = pytest.mark.gpu
CONFIG = dataclasses.replace(SMALL, hidden_size=96, head_dim=32, num_layers=4, sliding_window=20)


@torch.inference_mode()
def test_float32_logits(gpu: str) -> None:
    ours, theirs = reference_model(CONFIG, size=0.15)
    ids = random_ids(CONFIG, 2, 90)
    expected = theirs(ids).logits
    here = ours(ids)
    ours, theirs, ids = ours.to(gpu), theirs.to(gpu), ids.to(gpu)
    assert relative_error(ours(ids).cpu(), here) < 1e-5
    assert relative_error(ours(ids).cpu(), expected) < 1e-5
    assert relative_error(ours(ids).cpu(), theirs(ids).logits.cpu()) < 1e-5
    # With positions given, attention takes another way.
    positions = torch.arange(90, device=gpu).expand(2, 90)
    assert relative_error(ours(ids, positions).cpu(), here) < 1e-5


@torch.inference_mode()
def test_bfloat16_errors_are_not_above_those_of_transformers(gpu: str) -> None:
    total = {"ours": 0.0, "theirs": 0.0}
    for seed in range(4):
        ours, theirs = reference_model(CONFIG, seed=seed, size=0.15)
        rounded = {name: t.to(torch.bfloat16).float() for name, t in ours.state_dict().items()}
        ours.load_state_dict(rounded)
        ids = random_ids(CONFIG, 4, 64, seed=seed)
        truth = ours(ids).double()
        theirs, ours, ids = theirs.to(gpu, torch.bfloat16), ours.to(gpu, torch.bfloat16), ids.to(gpu)
        for name, logits in (("ours", ours(ids)), ("theirs", theirs(ids).logits)):
            total[name] += float((logits.double().cpu() - truth).square().mean().sqrt())
    assert total["ours"] <= total["theirs"]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("native", "flex")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_backends_prove_themselves(gpu: str, name: str, dtype: torch.dtype) -> None:
    assert failures(BACKENDS[name], gpu, dtype, with_softcap=name != "sdpa") == []


def test_flex_trains(gpu: str) -> None:
    """Compiled, with packed documents: the gradient of the plain formula."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 256, 64, generator=draw).to(gpu).requires_grad_() for heads in (4, 2, 2)]
    documents = torch.randint(0, 3, (2, 256), generator=draw).sort(-1).values.to(gpu)
    positions = torch.arange(256, device=gpu).expand(2, 256)
    visible = Visibility(positions, positions, 40, documents, documents)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compute in (attention, None):
            if compute:
                mixed = attention(*inputs, visible, scale=0.2, softcap=5.0)
            else:
                mixed = plain(*inputs, visible, 0.2, 5.0)
            mixed.sin().sum().backward()
            found.append([mixed.detach(), *(t.grad for t in inputs)])
            for t in inputs:
                t.grad = None
    for ours, expected in zip(*found, strict=True):
        assert relative_error(ours, expected) < 1e-3
