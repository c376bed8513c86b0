"""Muon (arXiv 2502.16982, section 2) when no rank has a whole matrix.

Turning a momentum into the nearest orthogonal matrix takes all of it. So the ranks take turns: of as many matrices as
there are ranks each rank gets one whole, turns it, and gives the others their parts back. A matrix travels twice in
bfloat16, and no two ranks do the same work.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon

from cabochon.train.ranks import Ranks
from cabochon.train.shards import box, local, slices

STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic; torch has the same


def newton_schulz(update: Tensor, eps: float = 1e-7) -> Tensor:
    """A matrix with the same singular vectors and values near 1, by five steps of the quintic; in bfloat16."""
    x = update.bfloat16()
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


class ShardedMuon(Muon):
    """torch's Muon over DTensors; the same steps."""

    def __init__(self, matrices: list[nn.Parameter], ranks: Ranks, **settings: Any) -> None:
        """Args: matrices, the same on all ranks in one order; ranks; settings of torch's Muon, one for all."""
        matrices = sorted(matrices, key=lambda p: -p.numel())  # those of a turn take equally long
        super().__init__(matrices, **settings)
        self.ranks = ranks
        # By rank and matrix: where the rank's part begins, and its size.
        self.boxes: list[list[tuple[list[int], list[int]]]] = ranks.gather([box(p) for p in matrices])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None
        (group,) = self.param_groups
        for start in range(0, len(group["params"]), self.ranks.world):
            turn = group["params"][start : start + self.ranks.world]
            parts = self._orthogonal([self._update(p, group) for p in turn], start)
            for p, part in zip(turn, parts, strict=True):
                rate = group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1]))
                local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=-rate)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """This rank's part of what is to be made orthogonal."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        gradient, momentum = local(p.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return (gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).bfloat16()

    def _orthogonal(self, updates: list[Tensor], start: int) -> list[Tensor]:
        """Parts of one turn's updates to parts of what they become."""
        rank, mine = self.ranks.rank, start + self.ranks.rank
        places = [boxes[mine] for boxes in self.boxes] if rank < len(updates) else []
        given = [part.numel() for part in updates] + [0] * (self.ranks.world - len(updates))
        taken = [math.prod(size) for _, size in places] or [0] * self.ranks.world
        pieces = _exchange(torch.cat([part.flatten() for part in updates]), given, taken).split(taken)
        back = updates[0].new_empty(0)
        if places:
            whole = updates[0].new_empty(self.param_groups[0]["params"][mine].shape)
            for piece, (offset, size) in zip(pieces, places, strict=True):
                whole[slices(offset, size)] = piece.view(size)
            turned = newton_schulz(whole)
            back = torch.cat([turned[slices(*place)].flatten() for place in places])
        results = _exchange(back, taken, given).split(given)
        return [piece.view_as(part) for piece, part in zip(results, updates, strict=False)]


def _exchange(flat: Tensor, given: list[int], taken: list[int]) -> Tensor:
    """Send each rank its stretch of a flat tensor, and get theirs."""
    out = flat.new_empty(sum(taken))
    torch.distributed.all_to_all_single(out, flat, taken, given)
    return out
