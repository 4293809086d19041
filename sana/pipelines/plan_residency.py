"""What offload keeps of a network on the device while the network runs: its cut by `offload_units.py`, in bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from sana.pipelines.memory.networks import named_weights
from sana.pipelines.memory.stages import MemoryModel
from sana.pipelines.offload_units import units_of


@dataclass(frozen=True)
class Cut:
    """The bytes of a network's parts.

    Attributes:
        units: of each unit that runs, in their order, and of the one that follows the last.
        rest: what is there while any of them runs.
    """

    units: tuple[int, ...]
    rest: int

    def held(self, offload: str) -> int:
        """Returns the most that is on the device at a time: "sequential" one unit, "group" the next one too."""
        most = max(self.units) if offload == "sequential" else max(map(sum, pairwise(self.units)))
        return self.rest + most


class OffloadModel(MemoryModel):
    """A memory model that knows what offload keeps, and may do without packed copies.

    Args:
        *arguments: of `MemoryModel`.
        packing: whether a CPU keeps copies of weights in its own layout, as many as `pack_budget()` allows.
        **options: of `MemoryModel`.
    """

    def __init__(self, *arguments: Any, packing: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._packing = packing
        self._cuts: dict[str, Cut] = {}

    def _split(self, part: str, network: Any) -> tuple[list[Tensor], list[Tensor]]:
        kept, left = super()._split(part, network)
        return (kept, left) if self._packing else ([], [*kept, *left])

    def held(self, network: str, offload: str) -> int:
        """Returns the most of a running network's weights that is on the device.

        Args:
            network: "text_encoder", "transformer" or "autoencoder", which decodes.
            offload: "none", "model", "group" or "sequential".
        """
        if offload in ("none", "model"):
            return self.weights(network).total
        if network not in self._cuts:
            self._cuts[network] = cut(network, self._build(network), self._block)
        return self._cuts[network].held(offload)


def cut(name: str, network: nn.Module, block: int = 1) -> Cut:
    """Cuts a network as `SanaPipeline`'s offload does.

    Args:
        name: "text_encoder", "transformer" or "autoencoder"; of the last, the units of decoding are taken.
        network: with tensors of any kind; only their sizes are read.
        block: bytes that every tensor is rounded up to a multiple of.
    """
    owner: Any = SimpleNamespace(model=network) if name == "text_encoder" else network
    units = units_of(name, owner)
    names = {id(tensor): full for full, tensor in named_weights(network)}
    sizes, inside = [], set()
    for unit in units.order:
        moving = [one for _, one in named_weights(unit) if not names[id(one)].endswith(units.rest or ("\0",))]
        sizes.append(_bytes((one for one in moving if names[id(one)] not in units.unread), block))
        inside |= {id(one) for one in moving}
    rest = [one for full, one in named_weights(network) if id(one) not in inside and full not in units.unread]
    decoder = getattr(network, "decoder", None)
    if name == "autoencoder" and decoder is not None:
        decoding = set(map(id, decoder.modules()))
        first = next(index for index, unit in enumerate(units.order) if id(unit) in decoding)
        sizes = [*sizes[first:], *sizes[:first]]
        running = sum(id(unit) in decoding for unit in units.order)
    else:
        running = len(sizes)
    return Cut(tuple([*sizes, sizes[0]][: running + 1]), _bytes(rest, block))


def _bytes(tensors: Iterable[Tensor], block: int) -> int:
    return sum(-(-tensor.nbytes // block) * block for tensor in tensors)
