"""From settings to a run: the model and what of it is trained, the data, what is saved. Everything is checked first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.machine import free_memory
from cabochon.data.config import DataConfig
from cabochon.data.pack import Batch
from cabochon.data.stream import BatchStream, open_eval, open_stream
from cabochon.data.teacher import open_teacher
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import PackedWeight
from cabochon.model.lora import LoraConfig, adapter_parameters, adapters, attach, merge
from cabochon.model.scored import ScoredGemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.checkpoint import Weights
from cabochon.train.config import TrainConfig
from cabochon.train.distill_config import DistillConfig
from cabochon.train.log import Record, trackers
from cabochon.train.loop import Measure, next_token_loss
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.objectives import next_tokens
from cabochon.train.on_policy import MixedStream, OnPolicy, open_rollouts, prompts_of, steps_of
from cabochon.train.parallel import shard
from cabochon.train.policy import policy_objective
from cabochon.train.policy_build import policy_stream
from cabochon.train.policy_config import PolicyConfig, check_policy
from cabochon.train.policy_stream import CURVES
from cabochon.train.preference import pair_count, preference, preference_measure
from cabochon.train.preference_config import PreferenceConfig, check_pairs
from cabochon.train.preference_stream import PairStream
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.reward_build import open_rewards
from cabochon.train.reward_config import RewardConfig
from cabochon.train.reward_model import calibrated, reward_measure, reward_objective
from cabochon.train.reward_model_config import RewardModelConfig
from cabochon.train.run import Run, Stream
from cabochon.train.shards import is_sharded, put
from cabochon.train.step import Objective, Trainer, targets_of
from cabochon.train.teacher_check import check_stored
from cabochon.train.teaching import Frozen, StoredBy, TaughtBy, frozen, taught
from cabochon.train.whole import Whole
from cabochon.weights.adapters import read_adapter, save_adapter
from cabochon.weights.folder import load_config, load_model
from cabochon.weights.quantize import quantize_layers
from cabochon.weights.read import Reader
from cabochon.weights.save import save_model
from cabochon.weights.verify import verify

TUNED, ADAPTED = 2e-5, 2e-4  # learning rates where none is given
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made from.

    Args:
        model: folder of the model to start from.
        name: what the user calls that model; an adapter remembers it as its base.
        out: the run's folder.
        train: steps and all that.
        data: rows.
        teachers: whose distributions are learnt, from models that run beside the student.
        stored: the same from a folder; without any teacher the next tokens are learnt.
        distill: how.
        on_policy: what the model writes itself; None: nothing, all is data.
        rewards: of policy optimisation: what is good about that.
        adapter: train adapters beside frozen weights; None: all weights.
        frozen: how frozen weights are held.
        merged: put adapters into the weights of the result.
        dtype: of the result's weights.
        device: "cpu", "cuda", ...
        track: names of trackers.
        asked: what the user asked for, as settings.toml is to have it.
    """

    model: Path
    name: str
    out: Path
    train: TrainConfig
    data: DataConfig
    teachers: tuple[TaughtBy, ...] = ()
    stored: StoredBy | None = None
    distill: DistillConfig = DistillConfig()
    on_policy: OnPolicy | None = None
    rewards: RewardConfig = RewardConfig()
    adapter: LoraConfig | None = None
    frozen: Frozen = "auto"
    merged: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    track: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)

    def settled(self) -> dict[str, Any]:
        """What a run that goes on has to have the same."""
        adapter = asdict(self.adapter) | {"frozen": self.frozen} if self.adapter else {}
        named = {f"adapter_{name}": value for name, value in adapter.items()}
        data = {f"data_{name}": value for name, value in self.data.settled().items()}
        names = [teacher.name for teacher in (*self.teachers, self.stored) if teacher]
        told = asdict(self.distill) | {"teacher": ", ".join(names)} if names else {}
        if len(self.teachers) > 1:
            told["teacher_shares"] = [teacher.share for teacher in self.teachers]
        written = self.on_policy.settled() if self.on_policy else {}
        told |= self.rewards.settled() if self.rewards.reward else {}
        return {"model": str(self.name)} | self.train.settled() | data | named | told | written


@dataclass(frozen=True)
class Aim:
    """What a run is for: its loss, what that is a mean over, what evaluations measure and make of it, curves."""

    loss: Objective
    counted: Callable[[Batch], int] = targets_of
    measure: Measure = next_token_loss
    summary: Callable[[Mapping[str, float]], dict[str, float]] = dict
    curves: Mapping[str, str] = field(default_factory=dict)


def build(
    settings: Settings,
    *,
    show: Callable[[Record], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    ranks: Ranks = SINGLE,
) -> Run:
    """Load the model, open the data, and the teacher if there is one. `show` and `note` are as in `Run`.

    With several ranks each takes its part of the rows and of the weights, on its own device.

    Raises:
        UsageError: a length beyond the context, weights that cannot be trained, a teacher of other tokens.
        BadInput, MissingResource: the model or the data cannot be read, or it does not fit the memory.
    """
    shape = load_config(settings.model)
    tokenizer = load_tokenizer(settings.model)
    tokenizer.check_fits(shape.vocab_size)
    _check_length(settings.train.length, shape)
    _check_memory(settings, shape, ranks)
    stream, steps = _stream(settings, tokenizer, shape, ranks)
    config = settings.train
    if not config.steps:
        config = replace(config, steps=ranks.on_first(steps))
        if ranks.first:
            note(f"the data makes {config.steps} steps")
    if not config.learning_rate:
        config = replace(config, learning_rate=ADAPTED if settings.adapter else TUNED)
    settings = replace(settings, train=config)
    torch.manual_seed(config.seed)
    model = _model(settings, sharded=ranks.world > 1)
    shard(model, ranks, config.precision)
    files, aim = tokenizer.files(), _aim(settings, tokenizer, shape, ranks)
    trainer = Trainer(model, config, aim.loss, ranks, counted=aim.counted)
    return Run(
        out=settings.out,
        trainer=trainer,
        stream=stream(trainer),
        weights=_adapter_weights(model, settings) if settings.adapter else _model_weights(model, files),
        export=partial(_export, model, settings, files),
        settings=settings.settled(),
        asked=settings.asked,
        held_out=_held_out(settings, tokenizer, ranks),
        measure=aim.measure,
        summary=aim.summary,
        curves=aim.curves,
        average=not isinstance(config, PolicyConfig),  # there it is what the policy is held to
        trackers=trackers(settings.track if ranks.first else (), settings.out, settings.asked),
        show=show,
        note=note,
    )


def _stream(
    settings: Settings, tokenizer: Tokenizer, shape: Gemma2Config, ranks: Ranks
) -> tuple[Callable[[Trainer], Stream], Callable[[], int]]:
    """What gives batches to a trainer, and what counts them when steps are not given."""
    written = settings.on_policy
    if written is None:
        stream, count = _given(settings, tokenizer, shape, ranks)
        return lambda trainer: stream, count
    train, data = settings.train, written.prompts
    pairs = isinstance(train, PreferenceConfig)  # of which two have to fit a row
    room = replace(train, length=train.length // 2) if pairs else train
    prompts = prompts_of(data, tokenizer, room, written.rollouts)
    endless = replace(settings, data=replace(settings.data, epochs=None))
    given = None if written.share == 1 else _given(endless, tokenizer, shape, ranks)[0]
    worth, rewards = settings.rewards, None
    if isinstance(train, PolicyConfig):
        check_policy(train, written.rollouts)
    if isinstance(train, PreferenceConfig):
        check_pairs(written.rollouts)
    if worth.reward:
        rewards = open_rewards(worth, settings.out, settings.device)

    def mixed(trainer: Trainer) -> Stream:
        own = open_rollouts(
            trainer.model, tokenizer, prompts, train, written.rollouts, shuffle=data.shuffle, ranks=ranks
        )
        if rewards and pairs:
            most = worth.max_failed_rewards
            return PairStream(own, rewards, most, tokenizer, length=train.length, ranks=ranks)
        if rewards:
            start = partial(_start, settings, ranks)
            most = worth.max_failed_rewards
            return policy_stream(own, trainer, rewards, most, tokenizer=tokenizer, start=start, out=settings.out)
        return own if given is None else MixedStream(own, given, written.share, train.seed)

    return mixed, lambda: steps_of(prompts, written) * (train.passes if isinstance(train, PolicyConfig) else 1)


def _start(settings: Settings, ranks: Ranks) -> Gemma2:
    """A frozen copy of the model that the run starts from."""
    return frozen(partial(load_model, settings.model, dtype=torch.float32), settings.device, ranks)


def _given(
    settings: Settings, tokenizer: Tokenizer, shape: Gemma2Config, ranks: Ranks
) -> tuple[Stream, Callable[[], int]]:
    """Batches of data, and what counts them."""
    train = settings.train
    if settings.stored:
        folder, epochs = settings.stored.folder, settings.data.epochs
        stored = open_teacher(
            folder, rows=train.rows, rank=ranks.part, world=ranks.parts, seed=train.seed, epochs=epochs,
            shuffle=settings.data.shuffle,
        )  # fmt: skip
        check_stored(stored.index, settings.distill, tokenizer, shape, str(folder))
        return stored, lambda: stored.batches or 0
    stream = open_stream(
        settings.data, tokenizer, rows=train.rows, length=train.length, rank=ranks.part, world=ranks.parts
    )
    _check_pairs(settings, stream)
    return stream, stream.count


def _aim(settings: Settings, tokenizer: Tokenizer, shape: Gemma2Config, ranks: Ranks) -> Aim:
    train = settings.train
    if isinstance(train, RewardModelConfig):
        return Aim(reward_objective(train), pair_count, reward_measure, calibrated)
    if isinstance(train, PreferenceConfig):
        reference = None if settings.adapter else _start(settings, ranks)
        return Aim(preference(train, reference), pair_count, preference_measure(train, reference))
    if isinstance(train, PolicyConfig) and settings.on_policy:
        return Aim(policy_objective(train, settings.on_policy.rollouts.sample_temperature), curves=CURVES)
    if not settings.teachers and settings.stored is None:
        return Aim(next_tokens(train))
    kind, student = CrossEntropy(train.label_smoothing, train.z_loss), (tokenizer, shape)
    who = settings.teachers, settings.stored, settings.distill
    return Aim(taught(*who, kind, student, device=settings.device, ranks=ranks))


def _model(settings: Settings, *, sharded: bool = False) -> Gemma2:
    """The model with its adapters. One that is going to be sharded stays in its files, as far as it can."""
    load = partial(load_model, settings.model, device="cpu" if sharded else settings.device, check_memory=not sharded)
    if settings.adapter is None:
        model = load(dtype=None if sharded else torch.float32)
        return ScoredGemma2.over(model) if isinstance(settings.train, RewardModelConfig) else model
    bits = {"int8": 8, "int4": 4}.get(settings.frozen)
    model = load(weights="bf16" if settings.frozen == "bf16" else "auto")
    if isinstance(model.embedding, PackedWeight):
        raise UsageError(
            f"{settings.name} cannot be trained",
            "its output head is quantised, and losses need it in floats",
            f"start from the model that it was made from, with --frozen int{model.embedding.bits}",
        )
    if bits:
        quantize_layers(model, bits)
    attach(model, settings.adapter)
    return model


def _model_weights(model: Gemma2, files: dict[str, bytes]) -> Weights:
    @torch.no_grad()
    def load(folder: Path) -> None:
        reader = Reader(verify(folder, scored=isinstance(model, ScoredGemma2)))
        for name, p in model.named_parameters():
            put(p, reader.load(name, p.dtype, torch.device("cpu")))

    return Weights(lambda folder, whole: save_model(model, folder, tokenizer_files=files, whole=whole), load)


def _adapter_weights(model: Gemma2, settings: Settings) -> Weights:
    @torch.no_grad()
    def load(folder: Path) -> None:
        deltas = read_adapter(folder, model.config).deltas
        for name, layer in adapters(model).items():
            delta = deltas[f"{name}.weight"]
            put(layer.a, delta.a)
            put(layer.b, delta.b)
            if layer.magnitude is not None and delta.magnitude is not None:
                put(layer.magnitude, delta.magnitude)

    return Weights(lambda folder, whole: save_adapter(model, folder, base_model_name=settings.name, whole=whole), load)


def _export(model: Gemma2, settings: Settings, files: dict[str, bytes], folder: Path, whole: Whole) -> None:
    """Write the result. The run is over: a model whose adapters are merged has none any more."""
    dtype = getattr(torch, settings.dtype)
    if settings.adapter is None:
        save_model(model, folder, tokenizer_files=files, dtype=dtype, whole=whole)
    elif settings.merged:
        model = _gathered(model, settings, whole)
        merge(model, dtype)
        save_model(model, folder, tokenizer_files=files, dtype=dtype)
    else:
        save_adapter(model, folder, base_model_name=settings.name, whole=whole)


def _gathered(model: Gemma2, settings: Settings, whole: Whole) -> Gemma2:
    """The model with its adapters, on one device."""
    learnt = adapter_parameters(model)
    if not any(is_sharded(p) for p in learnt.values()):
        return model
    alone = _model(replace(settings, device="cpu"))
    for name, p in adapter_parameters(alone).items():
        put(p, whole(name))
    return alone


def _held_out(settings: Settings, tokenizer: Tokenizer, ranks: Ranks) -> Callable[[], Iterator[Batch]] | None:
    rows, length = settings.train.rows, settings.train.length
    # What is wrong with it is to be said now, and not after an hour.
    first = open_eval(settings.data, tokenizer, rows=rows, length=length, rank=ranks.part, world=ranks.parts)
    if first is None:
        return None
    _check_pairs(settings, first)
    return first.again


def _check_pairs(settings: Settings, rows: BatchStream) -> None:
    """Raise `UsageError` when next tokens are learnt from pairs, which would teach what was rejected as well."""
    paired = isinstance(settings.train, PreferenceConfig | RewardModelConfig)
    if "preference" in rows.shapes and not (paired or settings.teachers or settings.stored or settings.on_policy):
        raise UsageError(
            "these rows cannot be learnt word by word",
            "they are pairs of a chosen and a rejected answer, and both would be learnt",
            "cabochon train dpo learns from pairs; or make rows of prompt and completion with the chosen ones",
        )


def _check_length(length: int, config: Gemma2Config) -> None:
    if length > config.max_position:
        raise UsageError(
            f"rows cannot have {length} tokens",
            f"the model's context ends at {config.max_position}",
            f"use --length {config.max_position}, or less",
        )


def _check_memory(settings: Settings, config: Gemma2Config, ranks: Ranks) -> None:
    """Refuse what cannot fit even before activations, with what would."""
    n, train = config.num_parameters, settings.train
    if settings.adapter:
        width = {"int4": 0.56, "int8": 1.0}.get(settings.frozen, 2.0)
        frozen, learnt = n * width, 16.0 * settings.adapter.num_parameters(config)
        needed, hint = frozen + learnt, "hold the frozen weights in fewer bits: --frozen int4"
        if learnt > frozen:
            hint = "train adapters of a lower rank: --lora-rank 16"
    else:
        copies = 2 + (2 if train.optimizer == "adamw" else 1) + (1 if train.ema else 0)
        copies += isinstance(train, PreferenceConfig | PolicyConfig)  # the reference
        needed, hint = 4.0 * n * copies, "train adapters beside frozen weights: --lora-rank 16 --frozen int4"
    if settings.device.startswith("cuda"):
        needed /= ranks.world
    free = free_memory(settings.device)
    if needed > free:
        raise MissingResource(
            f"training {settings.name} does not fit the memory of {settings.device}",
            f"weights, gradients and optimizer take {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free",
            hint,
        )
