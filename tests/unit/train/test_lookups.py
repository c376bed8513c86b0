"""Gradients of looked-up embeddings, added in place: those of autograd, and only inside the block."""

import pytest
import torch

from cabochon.model.gemma2 import Gemma2
from cabochon.train.lookups import lookups_in_place
from cabochon.train.losses.fused import cross_entropy
from cabochon.train.objectives import head_of
from support import SMALL, random_ids, small_model


def loss_of(model: Gemma2, with_head: bool) -> torch.Tensor:
    ids = random_ids(SMALL, 2, 30)
    ids[:, ::4] = 3  # looked up often
    hidden = model.hidden(ids).flatten(0, 1)
    return cross_entropy(hidden, head_of(model), ids.flatten(), 7.0) if with_head else hidden.square().sum()


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradient_is_that_of_autograd(with_head: bool, recompute: bool) -> None:
    model = small_model().double()
    model.recompute = recompute
    for _ in range(2):  # the second adds to what is there
        loss_of(model, with_head).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):
        with lookups_in_place(model):
            loss_of(model, with_head).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-12, atol=1e-12), name


def test_no_second_matrix_is_made() -> None:
    """What the block is for: autograd makes none of the embedding's size for the lookups."""
    model = small_model()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as plain:
        loss_of(model, True).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as inside, lookups_in_place(model):
        loss_of(model, True).backward()
    names = [{event.name for event in profile.events()} for profile in (plain, inside)]
    assert "aten::embedding_dense_backward" in names[0]
    assert "aten::embedding_dense_backward" not in names[1]


def test_what_fails_leaves_nothing_behind() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="stop"), lookups_in_place(model):
        loss_of(model, True)
        raise RuntimeError("stop")
    assert model.embedding.looked_up is None


def test_frozen_embeddings_get_none() -> None:
    model = small_model()
    model.embedding.weight.requires_grad_(False)
    with lookups_in_place(model):
        loss_of(model, True).backward()
    assert model.embedding.weight.grad is None
