"""A run on several devices: processes that torchrun starts, weights and optimizer shared out among them.

Weights are sharded (FSDP2, after arXiv 2304.11277 and ZeRO, 1910.02054): every rank keeps a slice of each matrix, and
its optimizer and average with it. A layer is gathered when it is needed and let go; its gradient is added up over the
ranks and cut into slices again. Beside that, the matrices inside the layers can be split over neighbouring ranks
(tensor parallelism, 1909.08053): heads and feed-forward channels go their own ways and meet once after attention and
once after the feed-forward. Embedding, norms and the head loss are then computed alike by all ranks of a group.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from cabochon.base.errors import MissingResource, UsageError
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import PackedWeight
from cabochon.model.lora import adapters
from cabochon.train.config import Precision
from cabochon.train.ranks import Ranks
from cabochon.weights.folder import usable_device

PATIENCE = timedelta(minutes=30)  # with a rank that is writing or reading, before it counts as gone
COLUMNS = "attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"  # cut by what they give
ROWS = "attention.o", "mlp.down"  # cut by what they take


def setup(device: str | None = None, tensor_parallel: int = 1, environment: Mapping[str, str] = os.environ) -> Ranks:
    """Join the processes that torchrun started; without torchrun, nothing happens.

    Args:
        device: "cpu" or "cuda"; None: CUDA where there is one. Each process of a machine takes a GPU of its own.
        tensor_parallel: how many neighbouring ranks share the matrices of the layers.
        environment: where torchrun says who this process is.

    Raises:
        UsageError: tensor parallelism without, or not dividing, the processes.
        MissingResource: the device cannot be used, this process has no GPU, or the others do not answer.
    """
    world = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
    kind = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    if tensor_parallel < 1 or world % tensor_parallel:
        raise UsageError(
            f"layers cannot be shared by {tensor_parallel} processes",
            f"the run has {world}",
            "start it with torchrun --nproc-per-node N, and --tensor-parallel a divisor of N",
        )
    if world == 1:
        return Ranks(device=str(usable_device(device or kind)))
    local = int(environment.get("LOCAL_RANK", "0"))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise MissingResource(
            f"process {local} of this machine has no GPU",
            f"there are {torch.cuda.device_count()}",
            f"start torchrun with --nproc-per-node {max(1, torch.cuda.device_count())}",
        )
    if kind == "cuda":
        torch.cuda.set_device(local)
    where = f"{kind}:{local}" if kind == "cuda" else kind
    return _join(int(environment["RANK"]), world, where, tensor_parallel)


def _join(rank: int, world: int, device: str, tensor_parallel: int) -> Ranks:
    from torch.distributed.device_mesh import init_device_mesh

    kind = device.partition(":")[0]
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        try:
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise MissingResource(
                "the processes of this run did not find each other",
                str(error).splitlines()[0],
                "check torchrun's --nnodes and --rdzv-endpoint, and that the machines reach each other",
            ) from None
    shape = (world // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))
    return Ranks(rank, world, device, tensor_parallel, mesh)


def leave(ranks: Ranks) -> None:
    """Take leave of the other processes at the end of a run, so that none waits."""
    if ranks.world > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(model: Gemma2, ranks: Ranks, precision: Precision = "bf16") -> None:
    """Share a model's weights out among the ranks, in place; what is trained becomes float32. Optimizers come later.

    With bf16 a layer's weights travel in bfloat16, which halves the traffic, and gradients are added up in float32.
    That is what one process under autocast computes, but for norms and embeddings, which are rounded to bfloat16 here.
    Beside frozen weights everything travels as it is.

    Args:
        model: the same on all ranks, on the CPU, where it may be no more than mapped files.
        ranks: nothing happens in a world of 1.
        precision: of products.

    Raises:
        UsageError: tensor parallelism for adapters, or with heads or channels that do not divide.
    """
    if ranks.world == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    frozen = any(not p.requires_grad for p in model.parameters())
    if ranks.tensor_parallel > 1:
        _check_splits(model, ranks.tensor_parallel)
        _split_layers(model, ranks.mesh["tensor"])
    mixed = precision == "bf16" and not frozen
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        cast_forward_inputs=False,  # the residual stream stays float32, as under autocast
    )
    settings = {"mesh": ranks.mesh["data"], "mp_policy": policy}
    for layer in model.layers:
        fully_shard(layer, **settings)
    # Head losses take the embedding's weight after the forward pass, so it is not let go in between.
    fully_shard(model, reshard_after_forward=False, **settings)
    if not frozen:
        model.float()
    module: Any
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way
    register_fsdp_forward_method(model, "hidden")
    if mixed:
        model.embedding.register_forward_hook(_widened)


def _widened(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    return out.float()


def _check_splits(model: Gemma2, count: int) -> None:
    what = f"the layers cannot be shared by {count} processes"
    if adapters(model) or any(isinstance(module, PackedWeight) for module in model.modules()):
        raise UsageError(
            what, "there are adapters or quantised weights in them", "leave --tensor-parallel out: weights are sharded"
        )
    config = model.config
    sizes = {
        "heads": config.num_heads,
        "key-value heads": config.num_kv_heads,
        "feed-forward channels": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % count:
            raise UsageError(what, f"the model has {size} {name}", "use a --tensor-parallel that divides them")


def _split_layers(model: Gemma2, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in COLUMNS}
    plan |= {name: RowwiseParallel() for name in ROWS}
    for layer in model.layers:
        # Every rank has the same weights and takes its own part: nothing has to be sent.
        parallelize_module(layer, mesh, plan, src_data_rank=None)
