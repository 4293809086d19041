"""What the steps of one sampling share: texts as keys and values, times as tables. They are made in `sana.py`."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sana.models.transformer.attention import KeyValue


class TimeCache(NamedTuple):
    """The modulation of every block and of the output layer at one time, which all rows of a batch share."""

    blocks: Tensor  # (depth, 6, D)
    time: Tensor  # (1, D), for the output layer


@dataclass(frozen=True)
class TextPart:
    """Texts of some rows of a batch as every block's cross-attention reads them.

    Attributes:
        rows: their places in the batch, rising.
        key_values: keys and values (len(rows), h, L, d) of every block.
        mask: (len(rows), L) booleans, or None where every token is read.
    """

    rows: tuple[int, ...]
    key_values: tuple[KeyValue, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class TextCache:
    """Texts of a whole batch: one part on a GPU; on a CPU one an image, so that its bits depend on no other image."""

    parts: tuple[TextPart, ...]

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return sum(len(part.rows) for part in self.parts)
