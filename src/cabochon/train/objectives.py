"""What a model is trained for: next tokens, or what a teacher thinks of them. Each is a loss of a part of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher import TeacherBatch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.distill_config import DistillConfig
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.losses.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TotalVariation
from cabochon.train.losses.fused import Blend, cross_entropy, distill
from cabochon.train.losses.teachers import Head, LiveTeacher, MixedTeachers, SampledTeacher, Teacher, TopKTeacher
from cabochon.train.step import Objective
from cabochon.train.teacher_check import check_capped


def next_tokens(config: TrainConfig) -> Objective:
    """Cross-entropy with the next token: pretraining, and supervised tuning where targets are the answers alone."""
    kind = CrossEntropy(config.label_smoothing, config.z_loss)

    def loss(model: Gemma2, batch: Batch, count: float) -> Tensor:
        hidden, targets = hidden_states(model, batch), batch.targets.flatten().to(model.device)
        return cross_entropy(hidden, head_of(model), targets, count, kind)

    return loss


def live_teacher(config: DistillConfig, teacher: Gemma2, kind: CrossEntropy = CrossEntropy()) -> Objective:
    """Distillation from a model that runs beside the student, without gradients, on the same rows.

    Args:
        teacher: of the student's vocabulary (`check_teacher`), on the student's device. Its layers may be quantised,
            its embedding not: the loss makes its logits chunk by chunk.
        kind: label smoothing and z-loss of the cross-entropy that `ce_share` asks for.

    Raises `UsageError` when the embedding is packed or a soft cap is off.
    """
    return mixed_teachers(config, [teacher], [1.0], kind)


def mixed_teachers(
    config: DistillConfig, teachers: Sequence[Gemma2], shares: Sequence[float], kind: CrossEntropy = CrossEntropy()
) -> Objective:
    """As `live_teacher`, from several models: their probabilities are averaged, by shares that add up to 1.

    Raises as `live_teacher`.
    """
    for teacher in teachers:
        _check_live(teacher)
        teacher.requires_grad_(False).eval()
    divergence = divergence_of(config)

    def loss(model: Gemma2, batch: Batch, count: float) -> Tensor:
        with torch.no_grad():
            said = tuple(LiveTeacher(hidden_states(teacher, batch), head_of(teacher)) for teacher in teachers)
        one = said[0] if len(said) == 1 else MixedTeachers(said, tuple(shares))
        return _distill(model, batch, count, one, divergence, config, kind)

    return loss


def stored_teacher(config: DistillConfig, kind: CrossEntropy = CrossEntropy()) -> Objective:
    """Distillation from what `open_teacher` reads; `check_stored` says beforehand whether it fits.

    `kind` is as in `live_teacher`. A batch without a teacher is a bug of the caller.
    """
    divergence = divergence_of(config)

    def loss(model: Gemma2, batch: Batch, count: float) -> Tensor:
        assert isinstance(batch, TeacherBatch)
        return _distill(model, batch, count, _stored(batch, model.device), divergence, config, kind)

    return loss


def divergence_of(config: DistillConfig) -> Divergence:
    """The divergence that a configuration names."""
    match config.divergence:
        case "forward-kl":
            return ForwardKL()
        case "reverse-kl":
            return ReverseKL()
        case "jsd":
            return JensenShannon(config.beta)
        case "tv":
            return TotalVariation()


def _distill(
    model: Gemma2,
    batch: Batch,
    count: float,
    teacher: Teacher,
    divergence: Divergence,
    config: DistillConfig,
    kind: CrossEntropy,
) -> Tensor:
    targets = batch.targets.flatten().to(model.device)
    return distill(
        hidden_states(model, batch),
        head_of(model),
        teacher,
        count,
        divergence,
        counted=targets != IGNORED,
        temperature=config.temperature,
        blend=Blend(targets, config.ce_share, kind) if config.ce_share else None,
    )


def _stored(batch: TeacherBatch, device: torch.device) -> TopKTeacher | SampledTeacher:
    ids, probabilities = (part.flatten(0, 1).to(device) for part in (batch.teacher_ids, batch.probabilities))
    if batch.weights is None:
        return TopKTeacher(ids.long(), probabilities)
    return SampledTeacher(ids.long(), probabilities, batch.weights.flatten(0, 1).to(device))


def _check_live(teacher: Gemma2) -> None:
    what = "this model cannot be a live teacher"
    if not teacher.embedding.weight.dtype.is_floating_point:
        raise UsageError(
            what,
            "its embedding, which is also its head, is packed, and the loss multiplies with its floats",
            "load it in bf16, or store what it says: cabochon teacher-logits",
        )
    check_capped(teacher.config, what)


def hidden_states(model: Gemma2, batch: Batch) -> Tensor:
    """Final hidden states [M, D] of a batch's M positions."""
    documents = batch.documents.to(model.device)
    return model.hidden(batch.ids.to(model.device), documents=documents).flatten(0, 1)


def head_of(model: Gemma2) -> Head:
    """The model's output head as losses take it."""
    return Head(model.embedding.weight, model.config.final_softcap)
