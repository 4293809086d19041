"""One process, DDP or FSDP2 behind one small interface, with mixed precision. What is trained is not known here.

Accelerate decides device, precision and process group. FSDP2 is torch's own `fully_shard`: Accelerate's plugin is
ignored on a CPU.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sana.config import ConfigError

PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
PARAMETER_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Parallel:
    """Where and how a module is trained.

    Args:
        mixed_precision: "fp32", "bf16" or "fp16" (which needs a GPU: its loss is scaled).
        use_fsdp: parameters, gradients and optimiser state are sharded over all processes (FSDP2) instead of copied.

    Attributes:
        rank, world_size, device: of this process.

    Raises:
        ConfigError: fp16 without a GPU, or FSDP together with fp16.
    """

    def __init__(self, mixed_precision: str, *, use_fsdp: bool = False) -> None:
        on_gpu = torch.cuda.is_available()
        if mixed_precision == "fp16" and not on_gpu:
            raise ConfigError("model.mixed_precision is fp16, which needs a CUDA GPU here; set it to bf16 or fp32.")
        if mixed_precision == "fp16" and use_fsdp:
            raise ConfigError("train.use_fsdp works with model.mixed_precision bf16 or fp32, not with fp16.")
        wanted = PRECISIONS[mixed_precision]
        known = AcceleratorState._shared_state.get("_mixed_precision", wanted)
        if known != wanted:  # Accelerate keeps one precision per process; a second run may need another
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(mixed_precision=wanted, cpu=not on_gpu)
        self.mixed_precision = mixed_precision
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        if use_fsdp and not dist.is_initialized():  # shards of one process: a run on several can go on alone
            backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.sharded = use_fsdp
        # Numbers that only hosts know are exchanged between hosts: NCCL would make them wait for their devices.
        self.hosts = dist.new_group(backend="gloo") if on_gpu and self.world_size > 1 else None
        self.module: nn.Module
        self.wrapped: nn.Module

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def prepare(self, module: nn.Module, shards: Iterable[nn.Module] = ()) -> nn.Module:
        """Moves a module to its device and makes it parallel; build the optimiser from `module` afterwards.

        Args:
            module: what is trained; its parameters become shards in place under FSDP.
            shards: sub-modules that FSDP gathers one at a time, inner ones first.

        Returns:
            The module to call: its gradients are the mean over all processes.
        """
        self.module = module.to(self.device)
        if self.sharded:
            dtype = PARAMETER_DTYPES[self.mixed_precision]
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for part in shards:
                fully_shard(part, mp_policy=policy)
            self.wrapped = fully_shard(module, mp_policy=policy)
        elif self.world_size > 1:
            self.wrapped = self.accelerator.prepare(module)
        else:
            self.wrapped = module
        return self.wrapped

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """Gives an optimiser fp16 loss scaling; the others are returned as they are."""
        return self.accelerator.prepare(optimizer) if self.mixed_precision == "fp16" else optimizer

    def autocast(self) -> AbstractContextManager:
        return self.accelerator.autocast() if self.mixed_precision != "fp32" else nullcontext()

    def accumulate(self, *, last: bool) -> AbstractContextManager:
        """Around one micro-batch: gradients are exchanged after the last one only."""
        if self.world_size == 1 or last:
            if self.sharded:
                self.wrapped.set_requires_gradient_sync(True)
            return nullcontext()
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(False)
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self, greatest: float) -> tuple[Tensor, Tensor | None]:
        """Scales all gradients so that their common norm is at most `greatest`.

        Returns:
            The norm before (0-d), and the norms (n,) of the n gradients in the order of the parameters; None for those
            of shards or of a scaled loss.
        """
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        if self.sharded:
            norm = torch.nn.utils.clip_grad_norm_(parameters, greatest)
            return self.full(norm), None
        if self.mixed_precision == "fp16" or not parameters:
            return self.accelerator.clip_grad_norm_(parameters, greatest), None
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(parameters, greatest, total)
        return total, norms

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over all processes: one exchange, the same result everywhere."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def sum_on_device(self, value: Tensor) -> Tensor:
        """Sums a tensor over all processes without the host waiting for it."""
        if self.world_size == 1:
            return value
        result = value.clone()
        dist.all_reduce(result, dist.ReduceOp.SUM)
        return result

    def max(self, *values: float) -> list[float]:
        """The greatest of each number over all processes, the same everywhere."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        result = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(result, operation, group=self.hosts)
        return result.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's `value` (any object that can be pickled) in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a sharded tensor (every process must ask), or the tensor itself."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def module_state(self) -> dict[str, Any]:
        """State dict of the module; shards under FSDP."""
        return get_model_state_dict(self.module) if self.sharded else self.module.state_dict()

    def load_module_state(self, state: dict[str, Any]) -> None:
        if self.sharded:
            set_model_state_dict(self.module, state, options=StateDictOptions(strict=True))
        else:
            self.module.load_state_dict(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return get_optimizer_state_dict(self.module, optimizer) if self.sharded else optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self.sharded:
            set_optimizer_state_dict(self.module, optimizer, state)
        else:
            optimizer.load_state_dict(state)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before FSDP gave it a class derived from it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
