"""Where the networks of a pipeline lie while they are not used: whole networks, blocks or groups leave the device.

How tensors come and go is in `sana.models.layers.residency` and `schedule`; where networks are cut, in
`offload_units.py`. Nothing is computed here.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from sana.models.layers.residency import Mover
from sana.models.layers.schedule import Residency
from sana.pipelines import loading
from sana.pipelines.offload_units import CAST_KEPT, NETWORKS, is_castable, units_of

KINDS = ("none", "model", "sequential", "group")
ATTRIBUTES = {"transformer": "transformer", "_autoencoder": "autoencoder", "_text_encoder": "text_encoder"}
# What a mode of compile() goes with: "graph" and "max" read weights where they lay before, and in "regional" a block is
# compiled as a whole, with what would move it. An entry is a kind of offload, or "casting".
COMPILED_WITH: dict[str, tuple[str, ...]] = {"graph": (), "max": (), "regional": ("model",)}
REMEDY_ON_CPU = (
    "On a CPU weights are read from the file where they lie (mmap) already; what lowers the memory is "
    "vae.enable_tiling(), quantize(), enable_layerwise_casting() and dtype='bf16'."
)


@dataclass(frozen=True)
class _Offload:
    """What was asked for; the default is nothing."""

    kind: str = "none"
    mover: Mover | None = None
    group: int = 0  # units that come together; 0 for a whole network
    prefetch: bool = False


@dataclass(frozen=True)
class _Casting:
    """What layerwise casting was asked for."""

    networks: tuple[str, ...]
    storage_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    kept: tuple[str, ...]


class Offloadable:
    """The part of `SanaPipeline` that keeps networks away from its device while they are not used.

    Attributes:
        offload: "none", "model", "sequential" or "group".
        load_device: where networks that are loaded from now on go: the host under offload, else the pipeline's device.
    """

    device: torch.device
    dtype: torch.dtype
    _offload: _Offload = _Offload()
    _casting: _Casting | None = None
    _residencies: dict[str, Residency] = {}  # noqa: RUF012  replaced, never written to

    @property
    def offload(self) -> str:
        """The kind of offload: "none", "model", "sequential" or "group"."""
        return self._offload.kind

    @property
    def load_device(self) -> torch.device:
        """Where a network is loaded to: never first to a device that it would leave at once."""
        return self.device if self._offload.mover is None else torch.device("cpu")

    def enable_model_cpu_offload(
        self, device: str | torch.device | None = None, *, low_cpu_mem_usage: bool = False
    ) -> Self:
        """Keeps networks in host memory; each comes to the device as a whole for its stage, and leaves after it.

        Costs one copy of each network a call, and saves all but the largest of them. The pictures are the same.

        Args:
            device: where networks compute; None for the pipeline's device. A pipeline that was loaded on the CPU is
                so given a GPU without its weights ever lying there together.
            low_cpu_mem_usage: leave weights in ordinary memory, where those of a file stay mapped from it; copies are
                then slower than from page-locked memory.

        Returns:
            The pipeline.

        Raises:
            ValueError: it computes on the CPU, or is compiled to graphs.
        """
        return self._enable("model", device, low_cpu_mem_usage)

    def enable_sequential_cpu_offload(
        self, device: str | torch.device | None = None, *, low_cpu_mem_usage: bool = False
    ) -> Self:
        """Keeps networks in host memory; one unit (transformer block, layer, stage) comes at a time.

        The least memory, and the slowest: every step copies every block, and nothing computes meanwhile.

        Args:
            device: see `enable_model_cpu_offload`.
            low_cpu_mem_usage: see there.

        Returns:
            The pipeline.

        Raises:
            ValueError: see there.
        """
        return self._enable("sequential", device, low_cpu_mem_usage, group=1)

    def enable_group_offload(
        self,
        num_blocks_per_group: int = 1,
        use_stream: bool = True,
        device: str | torch.device | None = None,
        *,
        low_cpu_mem_usage: bool = False,
    ) -> Self:
        """Keeps networks in host memory; groups of units come, the next one while the one before it computes.

        Args:
            num_blocks_per_group: units a group. Two groups are on the device at a time, one without `use_stream`.
            use_stream: copy the next group in a CUDA stream of its own.
            device: see `enable_model_cpu_offload`.
            low_cpu_mem_usage: see there; copies then wait for the host, so that less of them is hidden.

        Returns:
            The pipeline.

        Raises:
            ValueError: see there; or `num_blocks_per_group` is not positive; or there is no CUDA for `use_stream`.
        """
        if num_blocks_per_group < 1:
            raise ValueError(f"num_blocks_per_group must be at least 1, not {num_blocks_per_group}.")
        return self._enable("group", device, low_cpu_mem_usage, group=num_blocks_per_group, prefetch=use_stream)

    def disable_offload(self) -> Self:
        """Brings every network to the pipeline's device for good; layerwise casting stays.

        Returns:
            The pipeline.
        """
        self._change(_Offload())
        return self

    remove_all_hooks = disable_offload  # what diffusers calls it

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip: Sequence[str] | None = None,
        *,
        text_encoder: bool = False,
    ) -> Self:
        """Stores the large weights of the transformer's blocks in a small dtype, and casts each block up while it runs.

        Norms, biases, tables, depthwise convolutions and everything outside the blocks stay as they are. An 8-bit dtype
        takes each weight divided by a power of two, so that its range is used. What rounding takes is lost for good;
        where storage and compute dtype are the same nothing changes.

        Args:
            storage_dtype: the weights are stored in, a floating-point dtype.
            compute_dtype: they are cast to; None for the dtype they have.
            skip: parts of names that stay exact too, besides those of `offload_units.CAST_KEPT`.
            text_encoder: do the same with the layers of the text encoder.

        Returns:
            The pipeline.

        Raises:
            ValueError: a dtype is unfit, the pipeline is compiled to graphs, casting is on already, or there is nothing
                to cast (a quantised network).
        """
        for dtype in (storage_dtype, compute_dtype or self.dtype):
            if not dtype.is_floating_point:
                raise ValueError(f"Layerwise casting needs floating-point dtypes, not {dtype}.")
        if self._casting is not None:
            stored = self._casting.storage_dtype
            raise ValueError(f"The weights are stored in {stored} already; load them anew to store them otherwise.")
        self._refuse_compiled("layerwise casting", "casting")
        networks = ("transformer", "text_encoder") if text_encoder else ("transformer",)
        self._casting = _Casting(networks, storage_dtype, compute_dtype, (*CAST_KEPT, *(skip or ())))
        try:
            self._attach_all()
        except BaseException:
            self._casting = None
            raise
        return self

    @contextmanager
    def detached(self, network: str) -> Iterator[None]:
        """Lets a network be changed (its weights replaced, its dtype) while it lies at home; then manages it anew.

        Args:
            network: "text_encoder", "transformer" or "autoencoder".

        Raises:
            ValueError: layerwise casting stores it in another dtype.
        """
        residency = self._residencies.get(network)
        if residency is None:
            yield
            return
        if self._casting is not None and network in self._casting.networks:
            raise ValueError(f"The {network} is stored by layerwise casting and cannot be changed; load it anew.")
        self._detach(network)
        try:
            yield
        finally:
            self._attach(network, residency.network)

    def stage(self, network: str) -> AbstractContextManager[None]:
        """Makes a network ready on the pipeline's device while it is used. Stages may be nested.

        Args:
            network: "text_encoder", "transformer" or "autoencoder".
        """
        residency = self._residencies.get(network)
        return nullcontext() if residency is None else residency.use()

    def _enable(
        self,
        kind: str,
        device: str | torch.device | None,
        low_cpu_mem_usage: bool,
        *,
        group: int = 0,
        prefetch: bool = False,
    ) -> Self:
        target = self.device if device is None else loading.as_device(device)
        if target.type == "cpu":
            more = " Give device='cuda' to compute on the GPU." if torch.cuda.is_available() else ""
            raise ValueError(f"Offload moves nothing on a pipeline that computes on the CPU.{more} {REMEDY_ON_CPU}")
        if prefetch and target.type != "cuda":
            raise ValueError(f"use_stream needs a CUDA device, not {target}; give use_stream=False.")
        self._refuse_compiled(f"{kind} offload", kind)
        mover = Mover(target, pin=not low_cpu_mem_usage, prefetch=prefetch)
        self._change(_Offload(kind, mover, group, prefetch))
        return self

    def _change(self, offload: _Offload) -> None:
        """Takes another offload into use."""
        mover, before = offload.mover, self._offload
        self._offload = _Offload()  # what follows assigns the device
        if mover is not None and mover.device != self.device:
            self.device = mover.device
            self._forget_features()
        self._offload = offload
        if mover is None and before.mover is None:
            return
        self._attach_all()
        if mover is None and self._casting is None:
            for name in list(self._residencies):
                self._detach(name)

    def _attach_all(self) -> None:
        for attribute, name in ATTRIBUTES.items():
            network = getattr(self, attribute, None)
            if isinstance(network, nn.Module):
                self._attach(name, network)

    def _attach(self, name: str, network: nn.Module) -> None:
        """Begins to manage a network, or changes how it is managed."""
        offload, casting = self._offload, self._casting
        casts = casting is not None and name in casting.networks
        residency = self._residencies.get(name)
        if residency is None:
            if offload.mover is None and not casts:
                return
            residency = Residency(network, units_of(name, network))
            self._residencies = {**self._residencies, name: residency}
        if casting is not None and casts:
            kept = casting.kept
            castable = any(is_castable(slot, kept) for unit in residency.members for slot in unit)
            residency.cast(casting.storage_dtype, casting.compute_dtype, lambda slot: is_castable(slot, kept))
            if not castable and not any(slot.compute_dtype for slot in residency.slots):
                raise ValueError(f"Layerwise casting finds nothing to store in the {name}; is it quantised already?")
        residency.offload(offload.mover, group=offload.group, prefetch=offload.prefetch)

    def _detach(self, name: str) -> None:
        self._residencies[name].close()
        self._residencies = {key: value for key, value in self._residencies.items() if key != name}

    def _forget_features(self) -> None:
        features = getattr(self, "text_features", None)
        if features is not None:
            features.clear()

    def _refuse_compiled(self, what: str, kind: str) -> None:
        compiled: Any = getattr(self, "_compiled", None)
        if compiled is not None and kind not in COMPILED_WITH.get(compiled.settings.mode, (kind,)):
            raise ValueError(
                f"{what} moves weights that compile({compiled.settings.mode!r}) wants to stay where they are; call "
                "compile('off') first (model offload goes with compile('regional'))."
            )

    def _refuse_to_compile(self, mode: str) -> None:
        kinds = ([self.offload] if self.offload != "none" else []) + (["casting"] if self._casting is not None else [])
        unfit = [kind for kind in kinds if kind not in COMPILED_WITH.get(mode, (kind,))]
        if unfit:
            what = "layerwise casting" if unfit[0] == "casting" else f"{unfit[0]} offload"
            raise ValueError(
                f"compile({mode!r}) wants weights to stay where they are, and {what} moves them; call "
                "disable_offload() first, or leave one of the two (model offload goes with compile('regional'))."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Takes networks that are assigned under its management, and refuses what would defeat it."""
        active = self._offload.mover is not None or self._casting is not None
        if not active:
            super().__setattr__(name, value)
            return
        if name == "device" and torch.device(value) != self.device:
            raise ValueError(f"The pipeline offloads to {self.device}; call disable_offload() before another device.")
        if name == "dtype" and value != self.dtype:
            raise ValueError(f"An offloaded or cast pipeline keeps its dtype {self.dtype}; disable that first.")
        if name == "_compiled" and value is not None:
            self._refuse_to_compile(value.settings.mode)
        network = ATTRIBUTES.get(name)
        if network is not None and network in self._residencies and self._residencies[network].network is not value:
            self._detach(network)
        super().__setattr__(name, value)
        if network is not None and isinstance(value, nn.Module):
            self._attach(network, value)


assert set(ATTRIBUTES.values()) == set(NETWORKS)
