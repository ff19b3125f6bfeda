"""One process or many: who this one is, the process group, DDP and FSDP2."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..models.crate import PreNorm
from ..models.gpt import CausalBlock


@dataclass(frozen=True)
class World:
    """This process among ``size``, as torchrun numbers them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @staticmethod
    def from_environment(device: str | None) -> World:
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        rank, size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        index = f":{local_rank}" if kind == "cuda" else ""
        return World(rank, size, local_rank, torch.device(kind + index))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agrees(self, *numbers: int) -> bool:
        """Whether these are the same in all processes."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        first = mine.clone()
        if self.size > 1:
            dist.broadcast(first, 0)
        return self.sum((first != mine).sum()).item() == 0


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """NCCL for GPUs, gloo for CPUs; nothing where this process is alone."""
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    if world.size > 1:
        bound: dict[str, Any] = {"device_id": world.device} if cuda else {}
        dist.init_process_group("nccl" if cuda else "gloo", **bound)
    yield
    if world.size > 1:  # after an error the process ends at once, and torchrun ends the others
        # All at once, when the first has written its files: gloo's threads, which FSDP2 keeps, may
        # not hold a tensor any more when Python ends (pytorch 179291).
        dist.barrier()
        dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    """FSDP2: each step of a layer by itself, then the rest, in place.

    Nothing stays gathered after a forward, so parameters are always the sharded ones in between.
    """
    # It warns of writing into the result of a layer; the models add to it out of place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in list(model.modules()):
        if isinstance(module, (PreNorm, CausalBlock)):
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)


def replicate(model: nn.Module, world: World) -> nn.Module:
    ids = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around the backward passes of a step: only its ``last`` one exchanges gradients."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def full(value: Any) -> Tensor:
    """All of a tensor that FSDP2 may have split."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
