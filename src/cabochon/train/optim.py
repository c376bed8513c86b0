"""The optimizers of a run, what they remember as named tensors, and the average of the weights.

Muon (arXiv 2502.16982) turns the momentum of a matrix into the nearest orthogonal one; it is for the matrices inside
the layers. The embedding, which is the head as well, and the norms get AdamW (arXiv 1711.05101).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from cabochon.base.errors import BadInput
from cabochon.train.config import TrainConfig
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.shards import alike, local


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, config: TrainConfig, ranks: Ranks = SINGLE) -> list[Optimizer]:
    """What `config.optimizer` names, over the parameters that have gradients."""
    parameters = trainable(model)
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and name != "embedding.weight"]
    embedding = [p for name, p in parameters.items() if name == "embedding.weight"]
    vectors = [p for p in parameters.values() if p.ndim != 2]
    found: list[Optimizer] = []
    if config.optimizer == "muon":
        decayed: list[nn.Parameter] = []
        if matrices:
            found.append(_muon(matrices, config, ranks))
        vectors = embedding + vectors
    else:
        decayed = embedding + matrices
    groups = [
        {"params": params, "weight_decay": decay}
        for all_of_them, decay in ((decayed, config.weight_decay), (vectors, 0.0))
        for params in alike(all_of_them)
    ]
    if groups:
        found.append(AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


def _muon(matrices: list[nn.Parameter], config: TrainConfig, ranks: Ranks) -> Optimizer:
    settings: dict[str, Any] = {
        "lr": config.matrix_learning_rate,
        "weight_decay": config.weight_decay,
        "momentum": 0.95,
    }
    if ranks.world == 1:
        return Muon(matrices, **settings)
    from cabochon.train.muon import ShardedMuon

    return ShardedMuon(matrices, ranks, **settings)


def set_learning_rate(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every group to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def remembered(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """What the optimizers know of each parameter, as `parameter/quantity`."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def remember(
    model: nn.Module, optimizers: Iterable[Optimizer], keys: Iterable[str], fill: Callable[[str, Tensor], None]
) -> None:
    """The way back of `remembered`: makes a tensor for each key, like the parameter, and has it filled.

    Raises `BadInput` when one belongs to no parameter here.
    """
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for key in keys:
        name, _, quantity = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owners:
            raise BadInput(
                "the optimizer's state is that of another model",
                f"{name} is not trained here",
                "go on with the model and the adapter settings that the run was started with",
            )
        # AdamW's `step` is one number, on the device of the parameter.
        mine = torch.zeros((), device=parameter.device) if quantity == "step" else torch.zeros_like(parameter)
        fill(key, mine)
        owners[parameter].state[parameter][quantity] = mine


class Average:
    """Exponential moving average of the trained weights: average = decay * average + (1 - decay) * weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        new = trainable(model)
        averages = [local(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(averages, [local(new[name]) for name in self.tensors], 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the model's weights; twice is as before."""
        new = trainable(model)
        for name, tensor in self.tensors.items():
            kept = new[name].detach().clone()
            new[name].copy_(tensor)
            tensor.copy_(kept)
