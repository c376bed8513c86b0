"""What an adapter is to be. Standard library only."""

from dataclasses import dataclass

from cabochon.base.errors import UsageError, nearest
from cabochon.model.config import Gemma2Config

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: which matrices get one, and what it is made of. Raises `UsageError` for what cannot be.

    Attributes:
        rank: of B A, which is added to a matrix.
        alpha: B A is scaled by alpha / rank.
        targets: kinds of linear layers, as q or as PEFT's q_proj.
        dropout: share of an adapter's inputs that is left out while training.
        dora: learn the length of every row beside its direction (DoRA, arXiv 2402.09353).
        rslora: scale by alpha / sqrt(rank), so that higher ranks learn as fast (rsLoRA, arXiv 2312.03732).
        seed: of the random start of A; B starts at zero.
    """

    rank: int = 16
    alpha: float = 32
    targets: tuple[str, ...] = LINEARS
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"an adapter cannot have rank {self.rank}", "there is no such rank", "give 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise UsageError(f"alpha cannot be {self.alpha}", "it scales what is learnt", "use 32, or twice the rank")
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f"an adapter cannot have a dropout of {self.dropout}", "it is a share below 1", "use 0.05, or 0"
            )
        kinds = tuple(dict.fromkeys(target.removesuffix("_proj") for target in self.targets))
        wrong = next((kind for kind in kinds if kind not in LINEARS), None)
        if wrong is not None or not kinds:
            close = nearest(wrong or "", LINEARS)
            raise UsageError(
                f"{wrong!r} cannot be adapted" if wrong else "an adapter needs targets",
                "Gemma 2 has no linear layers of that name" if wrong else "without one there is nothing to train",
                f"did you mean {close}?" if close else f"there are {', '.join(LINEARS)}",
            )
        object.__setattr__(self, "targets", tuple(kind for kind in LINEARS if kind in kinds))

    def num_parameters(self, model: Gemma2Config) -> int:
        """How many weights such adapters beside a model have."""
        d, f = model.hidden_size, model.intermediate_size
        heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        sizes = {"q": (d, heads), "k": (d, kv), "v": (d, kv), "o": (heads, d)}
        sizes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
        taken = [sizes[kind] for kind in self.targets]
        return model.num_layers * sum(self.rank * (k + n) + (n if self.dora else 0) for k, n in taken)
