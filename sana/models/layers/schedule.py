"""In which order the units of a network come to the device and go: as a whole, one by one, or in groups with prefetch.

How one tensor is moved, and what is left in its place, is in `residency.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sana.models.layers.residency import LOCK, Mover, Slot, forget, manage, slots_below


@dataclass(frozen=True)
class Units:
    """How a network is cut.

    Attributes:
        order: the units as a forward runs them; none of their tensors lies in two of them.
        entries: the modules whose forward is a use of the network.
        deep: whether code outside a unit calls the modules inside it, so that each of them brings the unit.
        lazy: whether a network that moves as a whole waits for the forward of an entry.
        rest: name endings of tensors in units that code outside reads; they stay with the rest of the network.
        unread: names of tensors that inference never reads; they never move.
    """

    order: tuple[nn.Module, ...]
    entries: tuple[nn.Module, ...]
    deep: bool = False
    lazy: bool = False
    rest: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class Groups:
    """Units of a network in groups: at most one of them is on the device, or two with prefetch.

    Args:
        members: the slots of each unit, in the order of use.
        size: units a group.
        mover: copies them.
        prefetch: bring the next group while one computes. The host then waits, after it has asked for the first unit
            of a group, until the group before is done: only so its memory is free for the next.
        keep: do not let a group go before another comes.
    """

    def __init__(
        self, members: Sequence[Sequence[Slot]], size: int, mover: Mover, *, prefetch: bool = False, keep: bool = False
    ) -> None:
        self._mover = mover
        self._size = size
        self._prefetch = prefetch
        self._keep = keep
        starts = range(0, len(members), size)
        self._slots = [[slot for unit in members[start : start + size] for slot in unit] for start in starts]
        self._last = [min(start + size, len(members)) - 1 for start in starts]
        self._held: list[int] = []
        self._done: torch.cuda.Event | None = None

    def enter(self, unit: int) -> None:
        """Brings the group of a unit, unless it is there; what was kept for others goes first."""
        group = unit // self._size
        if group not in self._held:
            self.drop()
            self._bring(group, aside=False)

    def leave(self, unit: int) -> None:
        """Lets go what is used no more, and begins with the next group."""
        group = unit // self._size
        if group not in self._held:
            return
        following = (group + 1) % len(self._slots)
        if self._prefetch and following not in self._held:
            for before in [one for one in self._held if one != group]:
                if self._done is not None:
                    self._done.synchronize()
                self._let_go(before)
            with self._mover.aside():
                self._bring(following, aside=True)
        elif not self._prefetch and not self._keep and unit == self._last[group]:
            self._let_go(group)
        self._done = self._mover.mark()

    def drop(self) -> None:
        """Lets everything go."""
        for group in list(self._held):
            self._let_go(group)

    def _bring(self, group: int, *, aside: bool) -> None:
        taken = []
        try:
            for slot in self._slots[group]:
                slot.acquire(cast=False, aside=aside)
                taken.append(slot)
        except BaseException:
            for slot in taken:
                slot.release(cast=False)
            raise
        self._held.append(group)

    def _let_go(self, group: int) -> None:
        self._held.remove(group)
        for slot in self._slots[group]:
            slot.release(cast=False)


class Residency:
    """Where the tensors of one network are, and when.

    Until `offload` or `cast` is called nothing changes but that the network refuses to be moved by others.

    Args:
        network: whose tensors are managed.
        units: how it is cut.

    Raises:
        ValueError: the network is managed already.
    """

    def __init__(self, network: nn.Module, units: Units) -> None:
        self.network = network
        self.units = units
        self.slots = [slot for slot in manage(network) if slot.name not in units.unread]
        self.members = [[slot for slot in slots_below(unit) if self._moves_alone(slot)] for unit in units.order]
        inside = {id(slot) for unit in self.members for slot in unit}
        self.rest = [slot for slot in self.slots if id(slot) not in inside]
        found = ref(self)
        for slot in self.slots:
            slot.make_room = functools.partial(_make_room, found)
        self._mover: Mover | None = None
        self._groups: Groups | None = None
        self._sessions = 0
        self._base: list[Slot] = []  # held while the network is in use
        self._entered = [0] * len(units.order)
        self._handles = self._hook_entries()
        self._unit_handles: list[RemovableHandle] = []
        network._apply = _guard(found)  # type: ignore[method-assign]
        network._residency = self  # type: ignore[assignment]  # it lives as long as the network

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError(f"An offloaded {type(self.network).__name__} cannot be copied; call disable_offload() first.")

    def _moves_alone(self, slot: Slot) -> bool:
        return slot.name not in self.units.unread and not slot.name.endswith(self.units.rest or ("\0",))

    def offload(self, mover: Mover | None, *, group: int = 0, prefetch: bool = False) -> None:
        """Puts the network away, or with None brings it back for good.

        Args:
            mover: copies tensors.
            group: units that come together; 0 for the whole network at a time.
            prefetch: bring the next group while one computes.
        """
        assert not self._sessions, "a network in use does not change its home"
        with LOCK:
            self._reset()
            for slot in slots_below(self.network):
                slot.live_with(mover)
            self._mover, self._groups = mover, None
            if mover is not None and group and self.members:
                self._groups = Groups(self.members, group, mover, prefetch=prefetch, keep=self.units.deep)
            self._hook_units()

    def cast(self, dtype: torch.dtype, compute_dtype: torch.dtype | None, wanted: Callable[[Slot], bool]) -> int:
        """Keeps tensors of units in another dtype, from which they are cast while their unit runs.

        Args:
            dtype: they are stored in.
            compute_dtype: they are cast to; None for the dtype that each has.
            wanted: chooses among the slots of units.

        Returns:
            How many tensors are stored so now.
        """
        assert not self._sessions, "a network in use does not change its home"
        count = 0
        with LOCK:
            self._reset()
            for slot in (slot for unit in self.members for slot in unit if wanted(slot)):
                target = compute_dtype or slot.home.dtype
                if slot.compute_dtype is None and target != dtype:
                    slot.store(dtype, target)
                    count += 1
            self._hook_units()
        return count

    def close(self) -> None:
        """Ends the management; tensors stay where they are now, in the dtype they compute in."""
        with LOCK:
            self._reset()
            for slot in self.slots:
                if slot.compute_dtype is not None:
                    slot.widen()
            for slot in slots_below(self.network):
                slot.stay()
            for handle in (*self._handles, *self._unit_handles):
                handle.remove()
            for module in self.network.modules():
                _UNITS.pop(module, None)
            _ENTRIES.pop(self.network, None)
            for entry in self.units.entries:
                _ENTRIES.pop(entry, None)
            forget(self.network)
            self.network.__dict__.pop("_apply", None)
            self.network.__dict__.pop("_residency", None)

    @contextmanager
    def use(self, *, entry: bool = False) -> Iterator[None]:
        """Makes the network usable: all of it, or what lies outside its units, which come by themselves.

        Args:
            entry: whether its forward begins, for which a lazy network has waited.
        """
        self._begin(entry or not self.units.lazy)
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # of these PyTorch tells no hook: what began inside has ended as well
            self._sessions = 0
            raise
        finally:
            self._end()

    def _begin(self, hold: bool) -> None:
        with LOCK:
            if hold and self._mover is not None and not self._base:
                base = self.rest if self._groups is not None else self.slots
                taken = []
                try:
                    for slot in base:
                        slot.acquire(cast=False)
                        taken.append(slot)
                except BaseException:
                    for slot in taken:
                        slot.release(cast=False)
                    raise
                self._base = taken
            self._sessions += 1

    def _end(self) -> None:
        with LOCK:
            self._sessions = max(0, self._sessions - 1)
            if not self._sessions:
                self._reset()

    def _reset(self) -> None:
        """Drops every copy, also those whose unit was left by a signal."""
        if self._groups is not None:
            self._groups.drop()
        self._base = []
        self._entered = [0] * len(self.members)
        for slot in self.slots:
            slot.reset()

    def make_room(self) -> None:
        """Lets go what is kept for units of which none runs."""
        with LOCK:
            if self._groups is not None and not any(self._entered):
                self._groups.drop()

    def enter(self, unit: int) -> None:
        """A unit begins."""
        with LOCK:
            if self._groups is not None:
                self._groups.enter(unit)
            if not self.units.deep:
                taken = []
                try:
                    for slot in self.members[unit]:
                        slot.acquire()
                        taken.append(slot)
                except BaseException:
                    for slot in taken:
                        slot.release()
                    raise
            self._entered[unit] += 1

    def leave(self, unit: int) -> None:
        """A unit ends, also by an exception."""
        with LOCK:
            if not self._entered[unit]:  # it never began, or a signal has ended everything
                return
            self._entered[unit] -= 1
            if not self.units.deep:
                for slot in self.members[unit]:
                    slot.release()
            if self._groups is not None and not self._entered[unit]:
                self._groups.leave(unit)

    def _hook_units(self) -> None:
        """Watches the units where they come and go, and only there: a hook would be compiled with its block."""
        casts = any(slot.compute_dtype is not None for slot in self.slots)
        wanted = self._groups is not None or casts
        if not wanted:
            for handle in self._unit_handles:
                handle.remove()
            self._unit_handles = []
        if not wanted or self._unit_handles:
            return
        for index, unit in enumerate(self.units.order):
            for module in unit.modules() if self.units.deep else (unit,):
                _UNITS[module] = (ref(self), index)
                self._unit_handles.append(module.register_forward_pre_hook(_unit_begins, prepend=True))
                self._unit_handles.append(module.register_forward_hook(_unit_ends, always_call=True))

    def _hook_entries(self) -> list[RemovableHandle]:
        handles = []
        for entry in self.units.entries:
            _ENTRIES[entry] = ref(self)
            handles.append(entry.register_forward_pre_hook(_entry_begins, prepend=True))
            handles.append(entry.register_forward_hook(_entry_ends, always_call=True))
        return handles


# Which residency a hooked module belongs to. Copies of a module have its hooks, and are not found here.
_UNITS: "WeakKeyDictionary[nn.Module, tuple[ref[Residency], int]]" = WeakKeyDictionary()
_ENTRIES: "WeakKeyDictionary[nn.Module, ref[Residency]]" = WeakKeyDictionary()


def _make_room(found: "ref[Residency]") -> None:
    residency = found()
    if residency is not None:
        residency.make_room()


def _unit_begins(module: nn.Module, args: Any) -> None:
    found = _UNITS.get(module)
    residency = found and found[0]()
    if found and residency:
        residency.enter(found[1])


def _unit_ends(module: nn.Module, args: Any, output: Any) -> None:
    found = _UNITS.get(module)
    residency = found and found[0]()
    if found and residency:
        residency.leave(found[1])


def _entry_begins(module: nn.Module, args: Any) -> None:
    residency = _ENTRIES[module]() if module in _ENTRIES else None
    if residency is not None:
        residency._begin(True)


def _entry_ends(module: nn.Module, args: Any, output: Any) -> None:
    residency = _ENTRIES[module]() if module in _ENTRIES else None
    if residency is not None:
        residency._end()


def _guard(found: "ref[Residency]") -> Callable[..., nn.Module]:
    """Returns the `_apply` of a managed network: to be moved or cast is refused, and all else changes nothing."""

    @functools.wraps(nn.Module._apply)
    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        owner = found()
        assert owner is not None
        mover = owner._mover
        first = next(slot for slot in owner.slots if slot.home.is_floating_point())
        wanted = first.compute_dtype or first.home.dtype
        probe = torch.empty(0, dtype=wanted, device=first.home.device if mover is None else mover.device)
        result = fn(probe)
        if (result.device, result.dtype) != (probe.device, probe.dtype):
            kind = type(owner.network).__name__
            raise ValueError(
                f"{kind} is kept away from {probe.device} while it is not used, or in another dtype, and cannot be "
                f"moved or cast to {result.device}, {result.dtype}; call disable_offload() first."
            )
        return owner.network

    return apply
