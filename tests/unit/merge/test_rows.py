"""Inputs that are made row by row are merged as stored ones are, to the last bit."""

import pytest
import torch

from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge
from cabochon.merge.rows import whole_of_rows
from cabochon.weights.rows import stored_rows

NEEDED = {"weight": 0.5, "t": 0.3}


@pytest.mark.parametrize("shape", [(12, 20), (30,), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_rows(name, shape):
    method = METHODS[name]
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=draw).bfloat16() for _ in range(4)]
    count = min(3, method.models[1] or 3)
    models, base = inputs[:count], None if method.base == "none" else inputs[3]
    known = {parameter.name: parameter for parameter in method.parameters}
    own = {key: value for key, value in NEEDED.items() if key in known and known[key].per_model}
    shared = {key: value for key, value in NEEDED.items() if key in known and not known[key].per_model}
    settings = bind(method, shared, [own] * count, seed=3)
    expected, out = torch.empty(shape), torch.empty(shape)
    merge(method, Whole(tuple(models), base), settings, expected)
    rows = [stored_rows(tensor) for tensor in models]
    whole = whole_of_rows(shape, rows, None if base is None else stored_rows(base), block=40)
    merge(method, whole, settings, out)
    assert torch.equal(out, expected)
