"""Flags of the training commands, besides those that are fields of a `TrainConfig`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.data.config import DataConfig, Shape
from cabochon.train.config import TrainConfig

if TYPE_CHECKING:
    from cabochon.model.lora import LoraConfig

Device = Annotated[str | None, Parameter(help="cpu, cuda, cuda:1, ...; left out: the best one here.")]


@Parameter(name="*", group="The run")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run lives, and what becomes of it."""

    out: Annotated[Path, Parameter(help="Its folder: log, checkpoints, and at the end the model.")]
    resume: Annotated[
        Literal["auto", "never"],
        Parameter(help="auto: go on from the last whole checkpoint in --out, if there is one. never: start anew."),
    ] = "auto"
    config: Annotated[
        Path | None, Parameter(help="A TOML file with any of these flags; what is typed comes first.")
    ] = None
    save_dtype: Annotated[
        Literal["bfloat16", "float32"], Parameter(help="Precision of the finished model's weights.")
    ] = "bfloat16"
    device: Device = None
    track: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...],
        Parameter(negative="", help="Also send the log there. Can be repeated."),
    ] = ()


@Parameter(name="*", group="Data")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where rows come from and how they become batches."""

    data: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            allow_leading_hyphen=True,  # - is standard input
            help=".jsonl, .parquet, .txt, a folder of these, hf:NAME, or - for standard input. Can be repeated.",
        ),
    ] = ()
    data_weights: Annotated[
        tuple[float, ...], Parameter(negative="", help="Share of the tokens from each --data; none: each row once.")
    ] = ()
    shape: Annotated[Shape, Parameter(help="Of the rows; auto: by the keys of the first one.")] = "auto"
    epochs: Annotated[int, Parameter(help="Times through the data; 0: without end, as --steps says.")] = 0
    shuffle: Annotated[bool, Parameter(help="In an order of the seed's, another in each epoch.")] = True
    packing: Annotated[bool, Parameter(help="Several documents in a row, which do not see each other.")] = True
    fold_system: Annotated[
        bool, Parameter(negative="", help="Put system messages before the first user message; Gemma 2 has none.")
    ] = False
    held_out: Annotated[float, Parameter(help="Share of the documents that is kept for evaluation.")] = 0.0
    eval_data: Annotated[tuple[str, ...], Parameter(negative="", help="Evaluate on this instead.")] = ()
    max_bad_rows: Annotated[int, Parameter(help="Rows that cannot be used before the run stops.")] = 10

    def config(self, train: TrainConfig) -> DataConfig:
        """For the data pipeline. Without steps the data decides them, and goes round once unless told otherwise."""
        if self.data_weights and not self.epochs and not train.steps:
            raise UsageError(
                "a mixture with weights has no end",
                "it begins its smaller sources again, and no number of steps is given",
                "say how many steps to train (--steps 500), or leave out the weights",
            )
        return DataConfig(
            sources=self.data,
            weights=self.data_weights,
            shape=self.shape,
            fold_system=self.fold_system,
            max_bad_rows=self.max_bad_rows,
            epochs=self.epochs or (None if train.steps else 1),
            shuffle=self.shuffle,
            seed=train.seed,
            packing=self.packing,
            held_out=self.held_out,
            eval_sources=self.eval_data,
        )


@Parameter(name="*", group="The teacher")
@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Whose distribution is learnt."""

    teacher: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", help="A live teacher: a folder or a Hugging Face id. Of several, probabilities are mixed."
        ),
    ] = ()
    teacher_share: Annotated[
        tuple[float, ...], Parameter(negative="", help="Of each --teacher, when there are several; none: all alike.")
    ] = ()
    teacher_weights: Annotated[
        Literal["auto", "bf16", "int8", "int4"], Parameter(help="How its weights are held; its head stays in floats.")
    ] = "auto"
    teacher_logits: Annotated[
        Path | None, Parameter(help="Or a stored one: a folder that `cabochon teacher-logits` wrote; it is the data.")
    ] = None


@Parameter(name="*", group="On-policy")
@dataclass(frozen=True, kw_only=True)
class OnPolicyOptions:
    """Whether the student writes what it learns from."""

    prompts: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="What it answers: rows with `prompt` or `messages`; --epochs counts these."),
    ] = ()
    on_policy: Annotated[
        float | None,
        Parameter(help="Share of the batches that it writes (GKD's lambda); left out: all, with --prompts."),
    ] = None


@Parameter(name="*", group="Adapters")
@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Whether all weights are trained, or adapters beside them."""

    lora_rank: Annotated[int, Parameter(help="Rank of the adapters; 0: train all weights.")] = 0
    lora_alpha: Annotated[float, Parameter(help="Their strength is alpha / rank; 0: alpha is twice the rank.")] = 0.0
    lora_targets: Annotated[
        tuple[str, ...], Parameter(negative="", help="Linear layers that get one; none: q k v o gate up down.")
    ] = ()
    lora_dropout: Annotated[float, Parameter(help="Share of an adapter's inputs left out while training.")] = 0.0
    dora: Annotated[bool, Parameter(negative="", help="Learn lengths and directions of rows apart.")] = False
    rslora: Annotated[bool, Parameter(negative="", help="Strength alpha / sqrt(rank), for high ranks.")] = False
    frozen: Annotated[
        Literal["auto", "bf16", "int8", "int4"],
        Parameter(help="How frozen weights are held; int8 and int4 are QLoRA, in 1/2 and 1/4 of the memory."),
    ] = "auto"
    merge_adapters: Annotated[
        bool, Parameter(negative="", help="Write a whole model at the end instead of the adapter.")
    ] = False

    def config(self, seed: int) -> "LoraConfig | None":
        """The adapters, or None. Raises `UsageError` for flags that have no effect without them."""
        from cabochon.model.lora_config import LINEARS, LoraConfig

        if self.lora_rank == 0:
            if self != AdapterOptions():
                raise UsageError(
                    "flags for adapters have no effect here", "all weights are trained", "add --lora-rank 16"
                )
            return None
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2 * self.lora_rank,
            targets=self.lora_targets or LINEARS,
            dropout=self.lora_dropout,
            dora=self.dora,
            rslora=self.rslora,
            seed=seed,
        )
