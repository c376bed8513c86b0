"""Who teaches a student: models that run beside it, or what one said and was stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.distill_config import DistillConfig
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.objectives import mixed_teachers, stored_teacher
from cabochon.train.on_policy import by_batch
from cabochon.train.parallel import shard
from cabochon.train.ranks import Ranks
from cabochon.train.step import Objective
from cabochon.train.teacher_check import check_teacher
from cabochon.weights.folder import load_config, load_model
from cabochon.weights.quantize import quantize_layers

Frozen = Literal["auto", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class TaughtBy:
    """A live teacher: its folder, what the user calls it, how its weights are held, its share among several."""

    folder: Path
    name: str
    weights: Frozen = "auto"
    share: float = 1.0


@dataclass(frozen=True)
class StoredBy:
    """A folder that `cabochon teacher-logits` wrote."""

    folder: Path

    @property
    def name(self) -> str:
        return str(self.folder)


def taught(
    teachers: Sequence[TaughtBy],
    stored: StoredBy | None,
    how: DistillConfig,
    kind: CrossEntropy,
    student: tuple[Tokenizer, Gemma2Config],
    *,
    device: str,
    ranks: Ranks,
) -> Objective:
    """The loss of a student against its teachers, at least one of either kind.

    What the student wrote goes to the live ones, without a share of cross-entropy: its own words are no target. A
    stored teacher, where there is one, has the batches that it brings.

    Args:
        kind: label smoothing and z-loss of the share of cross-entropy.
        student: what it reads with, and its sizes.

    Raises:
        UsageError: a teacher of other tokens.
        BadInput, MissingResource: one cannot be read, or does not fit the memory.
    """
    given = stored_teacher(how, kind) if stored else None
    if not teachers:
        assert given is not None
        return given
    models = [_load(teacher, student, device, ranks) for teacher in teachers]
    total = sum(teacher.share for teacher in teachers)
    shares = [teacher.share / total for teacher in teachers]
    written = mixed_teachers(replace(how, ce_share=0.0), models, shares)
    return by_batch(written, given or mixed_teachers(how, models, shares, kind))


def _load(teacher: TaughtBy, student: tuple[Tokenizer, Gemma2Config], device: str, ranks: Ranks) -> Gemma2:
    config = load_config(teacher.folder)
    check_teacher(*student, load_tokenizer(teacher.folder), config, teacher.name)
    bits = {"int8": 8, "int4": 4}.get(teacher.weights)
    load = partial(load_model, teacher.folder, weights="auto" if bits else teacher.weights)
    return frozen(load, device, ranks, bits)


def frozen(load: Callable[..., Gemma2], device: str, ranks: Ranks, bits: int | None = None) -> Gemma2:
    """A model that runs beside the trained one and learns nothing; with several ranks in pieces, unless quantised."""
    sharded = ranks.world > 1 and not bits
    model = load(device="cpu" if sharded else device, check_memory=not sharded).requires_grad_(False).eval()
    if bits:
        quantize_layers(model, bits)
    elif sharded:
        shard(model, ranks)
    return model
