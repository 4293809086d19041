"""Tensors of a network that lie elsewhere, or in a smaller dtype, while they are not used. Inference only.

A tensor has a home (host memory, or a storage dtype on the device) that is the truth and never changes; while a unit of
its network is used, a copy of it stands in the module, and is dropped afterwards. In which order the units of a network
come and go is in `schedule.py`; which modules are units is the caller's decision.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

LOCK = threading.RLock()  # held while tensors come and go, never while anything is computed


class Mover:
    """Copies tensors between host memory and the device where they are used.

    Args:
        device: where they are used.
        pin: keep them in page-locked memory, from which a CUDA device copies faster and without waiting.
        prefetch: offer a stream of its own for copies that run beside the computation; needs CUDA.
    """

    def __init__(self, device: torch.device, *, pin: bool = True, prefetch: bool = False) -> None:
        self.device = device
        self.pin = pin and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if prefetch else None

    def put_away(self, tensor: Tensor) -> Tensor:
        """Returns the home form of a tensor."""
        home = move(tensor, torch.device("cpu"))
        return as_kind(pinned(home) if self.pin else home, tensor)

    def shown(self, home: Tensor) -> Tensor:
        """Returns what stands in the module while the tensor is away: the device does not compute with it."""
        return home

    def fetch(self, home: Tensor) -> Tensor:
        """Returns a copy on the device, in the current stream."""
        return as_kind(move(home, self.device), home)

    def aside(self) -> AbstractContextManager[Any]:
        """Runs copies in the mover's own stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> "torch.cuda.Event | None":
        """Returns an event after all that was asked of the current stream so far."""
        if self.device.type != "cuda" or self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hand_over(self, tensor: Tensor, ready: "torch.cuda.Event | None") -> None:
        """Makes a copy of another stream usable in the current one, and its memory free only when this one is done."""
        if ready is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for part in parts(tensor):
            part.record_stream(stream)


class Slot:
    """One tensor of a network: its home, the copy on the device, the copy in the dtype it computes in; both counted.

    Args:
        name: in the network.
        tensor: as it stands there.
        places: tables of modules that hold it, and its name in each; more than one for tied weights.
    """

    def __init__(self, name: str, tensor: Tensor, places: Sequence[tuple[dict[str, Any], str]]) -> None:
        self.name = name
        self.home = tensor
        self.mover: Mover | None = None
        self.compute_dtype: torch.dtype | None = None  # None: it is used as it is stored
        self._scale = 1.0
        self._places = tuple(places)
        self._moved: Tensor | None = None
        self._cast: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._moves = self._casts = 0
        self.make_room: Callable[[], None] = _nothing  # asks its network to drop what is kept for later

    @property
    def resident(self) -> bool:
        """Whether it is where it is used."""
        return self._moves > 0

    def store(self, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        """Keeps the tensor in another dtype from now on, scaled by a power of two to that dtype's range."""
        assert not self._moves and self.compute_dtype is None
        exact = self.home.detach().to(compute_dtype)
        self._scale = range_scale(exact, dtype)
        with torch.inference_mode(False):
            self.home = as_kind((exact / self._scale).to(dtype), self.home)
            if self.mover is not None:
                self.home = self.mover.put_away(self.home)
        self.compute_dtype = compute_dtype
        self._install()

    def widen(self) -> None:
        """Undoes `store`, but for what rounding took."""
        assert not self._moves and self.compute_dtype is not None
        with torch.inference_mode(False):
            self.home = as_kind(self._widened(self.home), self.home)
            if self.mover is not None:
                self.home = self.mover.put_away(self.home)
        self.compute_dtype, self._scale = None, 1.0
        self._install()

    def live_with(self, mover: Mover | None) -> None:
        """Changes the mover: the tensor goes to the new one's home, or with None to the device for good."""
        assert not self._moves
        with torch.inference_mode(False):
            if mover is not None:
                self.home = mover.put_away(self.home)
            elif self.mover is not None:
                self.home = self.mover.fetch(self.home)
        self.mover = mover
        self._install()

    def stay(self) -> None:
        """Ends what the mover does: the home is what stands in the module from now on."""
        self.mover = None
        self._install()

    def acquire(self, *, cast: bool = True, aside: bool = False) -> None:
        """Counts one more user; the first makes the copy.

        Args:
            cast: in the dtype it computes in, too.
            aside: whether the copy runs in the mover's own stream, so that its users must wait for it.
        """
        moved, wide = self._moved, self._cast
        with torch.inference_mode(False), torch.no_grad():
            if self.mover is not None and moved is None:
                moved = self.mover.fetch(self.home)
                self._ready = self.mover.mark() if aside else None
            elif self.mover is not None and moved is not None and not aside:
                self.mover.hand_over(moved, self._ready)
        if cast and self.compute_dtype is not None and wide is None:
            with torch.inference_mode():  # a copy that lives so short is not worth packing, see `sana.ops.packing`
                wide = as_kind(self._widened(self.home if moved is None else moved), self.home)
        self._moved, self._cast = moved, wide
        self._moves += 1
        self._casts += cast
        self._install()

    def release(self, *, cast: bool = True) -> None:
        """Counts one user less; the last one's leaving drops the copy."""
        self._casts -= cast
        self._moves -= 1
        if self._casts <= 0:
            self._cast = None
        if self._moves <= 0:
            self._moved = self._ready = None
        self._install()

    def reset(self) -> None:
        """Drops the copies whatever was counted."""
        if self._moves or self._casts:
            self._moves = self._casts = 0
            self._moved = self._cast = self._ready = None
            self._install()

    def _widened(self, stored: Tensor) -> Tensor:
        wide = stored.detach().to(self.compute_dtype)
        return wide if self._scale == 1.0 else wide.mul_(self._scale)

    def _install(self) -> None:
        away = self.home if self.mover is None or self._moved is not None else self.mover.shown(self.home)
        present = self._cast if self._cast is not None else self._moved
        for table, name in self._places:
            table[name] = away if present is None else present


# module -> the slots of the tensors that it holds itself; a module's entry goes with it
SLOTS: "WeakKeyDictionary[nn.Module, tuple[Slot, ...]]" = WeakKeyDictionary()


def manage(network: nn.Module) -> list[Slot]:
    """Makes a slot of every parameter and buffer of a network, tied ones once; nothing moves yet.

    Raises:
        ValueError: the network, or a part of it, is managed already.
    """
    if next(slots_below(network), None) is not None:
        raise ValueError(f"{type(network).__name__} is offloaded already; disable that first.")
    places: dict[int, tuple[str, Tensor, list[tuple[nn.Module, dict[str, Any], str]]]] = {}
    for prefix, module in network.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    places.setdefault(id(tensor), (full, tensor, []))[2].append((module, table, name))
    slots, owned = [], WeakKeyDictionary[nn.Module, list[Slot]]()
    for full, tensor, found in places.values():
        slot = Slot(full, tensor, [(table, name) for _, table, name in found])
        slots.append(slot)
        for module, _, _ in found:
            owned.setdefault(module, []).append(slot)
    SLOTS.update({module: tuple(dict.fromkeys(own)) for module, own in owned.items()})
    return slots


def forget(network: nn.Module) -> None:
    """Undoes `manage`; tensors stay where they are at this moment."""
    for module in network.modules():
        SLOTS.pop(module, None)


def slots_below(module: nn.Module) -> Iterator[Slot]:
    """Yields the slots of all tensors in a module, each once."""
    if not SLOTS:
        return
    seen: set[int] = set()
    for part in module.modules():
        for slot in SLOTS.get(part, ()):
            if id(slot) not in seen:
                seen.add(id(slot))
                yield slot


@contextmanager
def acquired(slots: Iterable[Slot], *, cast: bool = True) -> Iterator[None]:
    """Makes tensors ready while the context lasts; where one cannot be, none is."""
    taken: list[Slot] = []
    try:
        with LOCK:
            for slot in slots:
                slot.acquire(cast=cast)
                taken.append(slot)
        yield
    finally:
        with LOCK:
            for slot in reversed(taken):
                slot.release(cast=cast)


@contextmanager
def using(module: nn.Module) -> Iterator[None]:
    """Makes the weights of a module ready for code that reads them outside the forward of a unit.

    Where nothing is managed this does nothing. It may be nested, and stand inside a unit's forward.
    """
    slots = list(slots_below(module))
    if not slots:
        yield
        return
    if not any(slot.resident for slot in slots):
        slots[0].make_room()
    with acquired(slots):
        yield


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device where a module computes, wherever its weights lie at the moment."""
    mover = next((slot.mover for slot in slots_below(module) if slot.mover is not None), None)
    return next(module.parameters()).device if mover is None else mover.device


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype in which a module computes, whatever its weights are stored in: that of its first one."""
    slot = next(slots_below(module), None)
    first = next(module.parameters())
    return first.dtype if slot is None or slot.compute_dtype is None else slot.compute_dtype


def home_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of a module; of those that come and go the home, which stays the same."""
    if next(slots_below(module), None) is None:
        yield from module.parameters()
    else:
        yield from (slot.home for slot in slots_below(module) if isinstance(slot.home, nn.Parameter))


def _nothing() -> None:
    """Where no schedule keeps anything."""


def range_scale(tensor: Tensor, dtype: torch.dtype) -> float:
    """Returns the power of two to divide a tensor by, so that it fills the range of an 8-bit dtype; 1 for wider ones.

    Dividing by it and multiplying again is exact, so that only the rounding to the dtype is lost.
    """
    if not dtype.is_floating_point or dtype.itemsize > 1 or not tensor.numel():
        return 1.0
    largest = float(tensor.abs().amax())
    if not math.isfinite(largest) or largest == 0:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest / torch.finfo(dtype).max))


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that a tensor of any kind is made of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = getattr(state, "state2", None)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of any kind to a device, without waiting where its memory is page-locked.

    bitsandbytes moves the scales of a 4-bit weight in place, so those of a copy are made its own first.
    """
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor.detach().to(device, non_blocking=device.type == "cuda")
    own: Any = copy.copy(tensor)
    own.quant_state = copy.copy(state)
    if getattr(state, "state2", None) is not None:
        own.quant_state.state2 = copy.copy(state.state2)
    return own.to(device, non_blocking=device.type == "cuda")


def pinned(tensor: Tensor) -> Tensor:
    """Returns a tensor of any kind in page-locked memory."""
    if is_traceable_wrapper_subclass(tensor):
        return transform_subclass(tensor, lambda _, inner: pinned(inner))
    if getattr(tensor, "quant_state", None) is not None or tensor.is_pinned():
        return tensor  # a 4-bit weight of bitsandbytes is small, and has no form in page-locked memory
    return tensor.detach().pin_memory()


def as_kind(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor as a parameter without gradient where `like` is a parameter."""
    if not isinstance(like, nn.Parameter) or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
