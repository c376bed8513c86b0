"""The loss of a chunk against models beside the student: one teacher, or several whose probabilities are mixed.

Dimension letters: C tokens of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.model.kernels.losses import large
from cabochon.train.losses.divergences import Divergence
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.losses.teachers import LiveTeacher, MixedTeachers, Teacher, against_live

MIXED_WIDTH = 6  # what probabilities that are mixed take beside logits, in logits of bfloat16


def live_ones(teacher: Teacher) -> tuple[LiveTeacher, ...]:
    """The models that a teacher is made of; none if it was stored."""
    if isinstance(teacher, MixedTeachers):
        return teacher.teachers
    return (teacher,) if isinstance(teacher, LiveTeacher) else ()


class LiveLoss:
    """The chunk loss against live teachers, whose logits have a buffer of their own."""

    def __init__(
        self,
        teachers: Sequence[LiveTeacher],
        shares: Sequence[float],
        divergence: Divergence,
        student: LogitTransform,
        dtype: torch.dtype,
    ) -> None:
        self.teachers, self.shares = teachers, shares
        self.weights = [one.head.weight.detach().to(dtype) for one in teachers]
        self.divergence, self.student = divergence, student
        self.buffer: Tensor | None = None

    def __call__(self, raw: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = large(torch.empty_like(raw))  # the first chunk is the largest
        out = self.buffer[: len(rows)]
        soft_cap = None
        if len(self.teachers) == 1:
            soft_cap = self._said(out, rows)
        else:
            self._mix(out, rows)
        return against_live(raw, out, shares, self.divergence, self.student, soft_cap)

    def _said(self, out: Tensor, rows: Tensor, which: int = 0) -> float | None:
        """Fill in one teacher's raw logits; gives their soft cap."""
        teacher, weight = self.teachers[which], self.weights[which]
        torch.mm(teacher.hidden.detach()[rows].to(weight.dtype), weight.t(), out=out)
        return teacher.head.soft_cap

    def _mix(self, out: Tensor, rows: Tensor) -> None:
        """Fill in logits that, at the temperature of the loss, have the averaged probabilities."""
        temperature, mixed = self.student.temperature, None
        for which, share in enumerate(self.shares):
            soft_cap = self._said(out, rows, which)
            part = LogitTransform(soft_cap, temperature).apply(out).softmax(1).mul_(share)
            mixed = part if mixed is None else mixed.add_(part)
        assert mixed is not None
        out.copy_(mixed.clamp_min_(torch.finfo(mixed.dtype).tiny).log_().mul_(temperature))
