"""Model parallelism: the process group, and fairscale's layers made to hold one rank's share and nothing else.

With one rank there is no process group, no socket and no collective, and no environment variable is needed. With
several, each rank holds a slice of every matrix (Megatron-LM, arXiv:1909.08053, section 3). A column-parallel layer
cuts the output features. A row-parallel layer cuts the input features and adds up the ranks' results. The embedding
cuts its features.

Gradients are right on every rank: while autograd is on, sums and gathers go through fairscale's autograd functions.
Otherwise the layers call the collectives directly, which costs less and lets torch compile a step without a break.

Only this module imports fairscale and `torch.distributed`. Only this module reads the environment, where `torchrun`
tells a process its rank. It knows nothing of Llama, of weight names or of tokens.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_state
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel import mappings as fairscale_mappings
from torch import Tensor, nn

INIT_STD = 0.02  # standard deviation of a weight that no checkpoint fills, as for training from the beginning


def world() -> tuple[int, int]:
    """(rank, number of processes) of the whole job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_world() -> tuple[int, int]:
    """(rank, number of processes) on this machine."""
    rank, count = world()
    return int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", count))


def size() -> int:
    """Ranks that share one model."""
    if not fairscale_state.model_parallel_is_initialized():
        return 1
    return fairscale_state.get_model_parallel_world_size()


def rank() -> int:
    """This process's place among the ranks that share its model."""
    return fairscale_state.get_model_parallel_rank() if size() > 1 else 0


def group() -> int:
    """The index of this rank's group among those of the job that hold a model each; 0 if all share one model.

    Four ranks in groups of two are groups 0, 0, 1 and 1. Groups work on prompts of their own, so whatever is drawn at
    random and should differ between them takes this number into account.
    """
    number, _ = world()
    return number // size()


def initialize(model_parallel_size: int | None, backend: str | None, device: torch.device) -> None:
    """Form groups of `model_parallel_size` ranks (all by default) that share one model each.

    `backend` is the collective library for `device`, None where there is none. A process group that exists is used
    and left alone; one made here is destroyed at exit, and an exception that nothing catches on one rank ends the job
    at once, with that rank's message alone. Raises `ValueError` for a size that does not divide the job.
    """
    _, count = world()
    ranks = count if model_parallel_size is None else model_parallel_size
    if ranks < 1 or count % ranks:
        job = "this job has 1 process" if count == 1 else f"this job has {count} processes"
        start = f"start it with `torchrun --standalone --nproc_per_node {max(ranks, 1)} ...`"
        raise ValueError(
            f"model_parallel_size is {ranks}, but {job}; {start}, or leave the argument out."
        )

    # Groups are formed once; a model alone needs none.
    if fairscale_state.model_parallel_is_initialized():
        if size() != ranks:
            raise ValueError(
                f"This process already shares models over {size()} ranks; it cannot now use {ranks}."
            )
        return
    if ranks == 1:
        return
    if backend is None:
        raise ValueError(
            f"Collectives do not work on {device.type}; use one process there, or device='cpu'."
        )

    # All ranks of the job meet, unless the caller has seen to that.
    if not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://"))
        device_id = device if device.index is not None else None
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, device_id=device_id
        )
        atexit.register(close)
        end_job_on_error(store)

    with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines
        fairscale_state.initialize_model_parallel(ranks)


def close() -> None:
    """Destroy the groups that `initialize` made: first fairscale's, which refer to the process group, then that."""
    fairscale_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_job_on_error(store: dist.Store) -> None:
    """From now on, an exception that nothing catches ends this process, and is printed if it is the job's first.

    When one rank fails, the others fail in their next collective and would print a traceback each. All ranks count
    their failures in `store`, and only the first to count prints. The process leaves without the usual clean-up, in
    which it would wait for ranks that no longer answer.
    """
    show = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        try:
            first = store.add("llama/failed ranks", 1) == 1
        except RuntimeError:  # the store is gone with the rank that kept it
            first = True

        if first and not issubclass(kind, KeyboardInterrupt):
            show(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = end_job


def broadcast(x: Tensor) -> Tensor:
    """Overwrite `x` on every rank of the group with the first rank's `x`, and return it."""
    if size() > 1:
        source = fairscale_state.get_model_parallel_src_rank()
        dist.broadcast(x, source, group=fairscale_state.get_model_parallel_group())
    return x


def broadcast_object(value: Any, device: torch.device) -> Any:
    """The first rank's object, on every rank of the group; it must be picklable, and travels through `device`."""
    if size() == 1:
        return value

    box = [value]
    source = fairscale_state.get_model_parallel_src_rank()
    group = fairscale_state.get_model_parallel_group()
    dist.broadcast_object_list(box, source, group=group, device=device)
    return box[0]


def share_input(x: Tensor) -> Tensor:
    """The same input for each rank's share of a matrix; the gradient of `x` is the sum over all shares."""
    if torch.is_grad_enabled() and size() > 1:
        return fairscale_mappings.copy_to_model_parallel_region(x)
    return x


def add_up(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place, on every rank."""
    if size() == 1:
        return x
    if torch.is_grad_enabled():
        return fairscale_mappings.reduce_from_model_parallel_region(x)
    dist.all_reduce(x, group=fairscale_state.get_model_parallel_group())
    return x


def gather(x: Tensor) -> list[Tensor]:
    """Every rank's tensor, on every rank; autograd does not see it."""
    shares = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(shares, x.contiguous(), group=fairscale_state.get_model_parallel_group())
    return shares


def gather_features(x: Tensor) -> Tensor:
    """Put the ranks' shares of the last dimension side by side, on every rank."""
    if size() == 1:
        return x
    if torch.is_grad_enabled():
        return fairscale_mappings.gather_from_model_parallel_region(x)
    return torch.cat(gather(x), dim=-1)


class SharedCopy(torch.autograd.Function):
    """A weight of which `copies` neighbouring ranks hold the same; its gradient is the sum of what they find."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copies: int) -> Tensor:
        ctx.first = rank() // copies * copies
        ctx.copies = copies
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        holders = gather(gradient)[ctx.first : ctx.first + ctx.copies]
        return torch.stack(holders).sum(dim=0), None


def hold(layer: nn.Module, rows: int, columns: int) -> None:
    """Give a layer its share of the weights, (rows, columns), and no bias.

    The weights are small normal numbers, for training from the beginning; on the meta device, which a checkpoint
    fills later, nothing is drawn.
    """
    layer.weight = nn.Parameter(torch.empty(rows, columns))
    layer.register_parameter("bias", None)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=INIT_STD)


def product(layer: nn.Module, x: Tensor, weight: Tensor | nn.Module) -> Tensor:
    """x W'. A quantized weight is a module and multiplies itself; a plain one is multiplied as its layer does it."""
    if isinstance(weight, nn.Module):
        return weight(x)
    return layer.multiply(x, weight)


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """x W' with the rows of W, the output features, shared out; `gather_output` puts the results side by side.

    fairscale's constructor builds the full matrix on every rank and on the CPU. This one makes this rank's share
    alone, on any device, meta included. If the ranks do not divide the features, W is padded at its end, and the
    gathered output is cut off there.

    Where there are fewer things to share out than ranks, `copies` neighbouring ranks hold the same rows, counted that
    many times in `out_features`: two key-value heads of dimension 64 on four ranks are 256 features in two copies.
    """

    multiply = staticmethod(F.linear)  # how a plain weight is multiplied

    def __init__(
        self, in_features: int, out_features: int, gather_output: bool = False, copies: int = 1
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.copies = copies
        self.output_size_per_partition = -(-out_features // size())  # rounded up
        hold(self, self.output_size_per_partition, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out / ranks), or (..., out) if gathered."""
        weight = self.weight
        shared = self.copies > 1 and isinstance(weight, Tensor) and weight.requires_grad
        if shared and torch.is_grad_enabled():
            weight = SharedCopy.apply(weight, self.copies)

        y = product(self, share_input(x), weight)
        if self.gather_output:
            return gather_features(y)[..., : self.out_features]
        return y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """x W' with the columns of W, the input features, shared out: each rank has its share of x, and gets the sum."""

    multiply = staticmethod(F.linear)  # how a plain weight is multiplied

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = True
        self.input_size_per_partition = in_features // size()
        hold(self, out_features, self.input_size_per_partition)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in / ranks) -> (..., out)."""
        return add_up(product(self, x, self.weight))


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """A row of features for each id. Each rank holds some of the features of every row; the output has them all."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.embedding_dim_per_partition = embedding_dim // size()
        hold(self, num_embeddings, self.embedding_dim_per_partition)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        return gather_features(F.embedding(ids, self.weight))
