"""Packed documents answer as they do alone, in a row of their own."""

import torch

from support import SMALL, random_ids, relative_error, small_model


@torch.no_grad()
def test_packed_equals_separate() -> None:
    model = small_model()
    lengths = (11, 3, 20)
    parts = [random_ids(SMALL, 1, n, seed=n) for n in lengths]
    numbers = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    packed = model(torch.cat(parts, 1), documents=numbers)
    for part, got in zip(parts, packed.split(lengths, 1), strict=True):
        assert relative_error(got, model(part)) < 1e-5  # positions that do not restart change nothing either
