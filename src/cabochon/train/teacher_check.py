"""Whether a student can learn from a teacher: both have to mean the same by every id."""

from cabochon.base.errors import UsageError
from cabochon.data.teacher_format import fingerprint
from cabochon.data.teacher_index import TeacherIndex
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import Tokenizer
from cabochon.train.distill_config import DistillConfig


def check_capped(teacher: Gemma2Config, what: str) -> None:
    """Raise `UsageError`, which begins with `what`, when a teacher's soft cap is off."""
    if teacher.attn_softcap is None or teacher.final_softcap is None:
        raise UsageError(
            what, "its soft cap is turned off, which makes another model of it", "load it with its soft caps on"
        )


def check_teacher(
    tokenizer: Tokenizer, config: Gemma2Config, teacher: Tokenizer, teacher_config: Gemma2Config, name: str
) -> None:
    """Raise `UsageError` unless a model that is to be a live teacher has the student's ids.

    Args:
        tokenizer, config: the student's.
        teacher, teacher_config: the teacher's.
        name: what the teacher is called in the error.
    """
    _check_ids(name, (config.vocab_size, fingerprint(tokenizer)), (teacher_config.vocab_size, fingerprint(teacher)))


def check_stored(
    index: TeacherIndex, settings: DistillConfig, tokenizer: Tokenizer, config: Gemma2Config, name: str
) -> None:
    """Raise `UsageError` unless a stored teacher has the student's ids and can give the loss that is asked for.

    Args:
        index: of the folder (`read_index`, or `open_teacher(...).index`).
        settings: what is asked for.
        tokenizer, config: the student's.
        name: what the teacher is called in the error.
    """
    facts = index.facts
    _check_ids(name, (config.vocab_size, fingerprint(tokenizer)), (facts.vocab_size, facts.tokenizer))
    what = f"{name} cannot teach this"
    if settings.temperature != facts.temperature:
        raise UsageError(
            what,
            f"its probabilities are those at temperature {facts.temperature}, not {settings.temperature}",
            f"give --temperature {facts.temperature}, or store the teacher at the other one",
        )
    if facts.kind == "sampled" and settings.divergence != "forward-kl":
        raise UsageError(
            what,
            f"a sample of a distribution estimates forward-kl alone, not {settings.divergence}",
            "leave --divergence out, or store the likeliest ids: cabochon teacher-logits without --sampled",
        )
    if facts.length > config.max_position:
        raise UsageError(
            what,
            f"its rows have {facts.length} positions, the student's context {config.max_position}",
            f"store it with --length {config.max_position}",
        )


def _check_ids(name: str, ours: tuple[int, str], theirs: tuple[int, str]) -> None:
    """Compare vocabulary sizes and fingerprints."""
    what = f"{name} cannot teach this student"
    hint = "student and teacher need the same tokenizer: choose a teacher of the same family"
    if ours[0] != theirs[0]:
        raise UsageError(what, f"it knows {theirs[0]} ids, the student {ours[0]}", hint)
    if ours[1] != theirs[1]:
        raise UsageError(what, "its tokenizer has other pieces under the same ids", hint)
