"""What the steps of one sampling share: texts as keys and values, times as tables. Formulas are in the layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana.models.layers.residency import using
from sana.models.transformer.attention import KeyValue, readable_tokens
from sana.models.transformer.embedding import unpatchify


class TimeCache(NamedTuple):
    """The modulation of every block and of the output layer: at one time that all rows of a batch share, or by row."""

    blocks: Tensor  # (depth, 6, D), or (depth, B, 6, D)
    time: Tensor  # (1, D), or (B, D), for the output layer

    def of_rows(self, rows: tuple[int, ...]) -> "TimeCache":
        """Returns that of some rows of the batch."""
        if self.blocks.dim() == 3:
            return self
        return TimeCache(self.blocks[:, rows], self.time[rows, :])


def join_times(times: Sequence[TimeCache], rows: Sequence[int]) -> TimeCache:
    """Returns the times of a batch whose rows do not share one.

    Args:
        times: each shared by the rows that have it.
        rows: for each of the B rows the place of its time in `times`.
    """
    places = torch.tensor(list(rows), device=times[0].time.device)
    blocks = torch.stack([one.blocks for one in times], dim=1)
    return TimeCache(blocks[:, places], torch.cat([one.time for one in times])[places])


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


class CachedSampling:
    """The part of `Sana` that samples with prepared texts and times: the numbers of its `forward`, in less work."""

    cacheable = True  # whether `denoise` serves in the place of `forward`
    architecture: Any
    blocks: Any
    embed_time: Any
    embed_latents: Any
    t_block: Any
    final_layer: Any
    rotary: Any

    @torch.no_grad()
    def cache_text(
        self, y: Tensor, mask: Tensor | None = None, *, branches: int = 1, batch_invariant: bool | None = None
    ) -> TextCache:
        """Projects texts, once for all steps of sampling, to the keys and values of every block.

        Args:
            y: (B, L, C_text) or (B, 1, L, C_text) text embeddings.
            mask: (B, L), non-zero for tokens that may be read; None: all.
            branches: number k of rows that belong to one image, as guidance stacks them: rows i, i + B / k, ...
            batch_invariant: as in `forward`, but for images instead of rows: the branches of an image are computed
                together, and keep the tokens only that one of them reads. Else all L are kept with the mask, so that
                nothing waits for a GPU: cut them before.

        Raises:
            ValueError: the network needs more inputs than `denoise` takes, or k does not divide B.
        """
        if not self.cacheable:
            raise ValueError(f"{type(self).__name__} is sampled with forward(); denoise() does not know its inputs.")
        if len(y) % branches:
            raise ValueError(f"{len(y)} rows are not {branches} branches of as many images.")
        y = y if y.dim() == 4 else y.unsqueeze(1)
        mask = None if mask is None else readable_tokens(mask.flatten(1))
        if not (self._by_row(y) if batch_invariant is None else batch_invariant):
            return TextCache((self._cache_rows(tuple(range(len(y))), y, mask),))
        images = len(y) // branches
        parts = []
        for image in range(images):
            rows = tuple(range(image, len(y), images))
            text, own = self._trim(y[rows, ...], None if mask is None else mask[rows, ...])
            parts.append(self._cache_rows(rows, text, own))
        return TextCache(tuple(parts))

    @torch.no_grad()
    def cache_time(self, timestep: Tensor, cfg_scale: Tensor | None = None) -> list[TimeCache]:
        """Computes the modulation of every block at times (S,), given as to `forward`: one entry a time."""
        tables = torch.stack([block.scale_shift_table for block in self.blocks])  # (depth, 6, D)
        times = self.embed_time(timestep, cfg_scale)  # (S, D)
        projected = self.t_block(times).unflatten(-1, (6, -1))  # (S, 6, D)
        return [TimeCache(tables + shared, time[None]) for shared, time in zip(projected, times, strict=True)]

    def denoise(
        self, x: Tensor, time: TimeCache, text: TextCache, *, pag_layers: tuple[int, ...] = (), pag_rows: int = 0
    ) -> Tensor:
        """`forward` with what does not change between steps, or between rows, made before; waits for no device.

        Args:
            x: (B, C, H, W) latents.
            time: of all rows, or of each.
            text: of the B rows.
            pag_layers: see `forward`.
            pag_rows: see `forward`.

        Returns:
            (B, C', H, W).

        Raises:
            ValueError: the arguments do not fit the model or one another.
        """
        if text.rows != x.shape[0]:
            raise ValueError(f"latents of {x.shape[0]} rows and texts of {text.rows} do not fit.")
        self._check_shape(x)
        self._check_perturbation(x, tuple(pag_layers), pag_rows)
        layers, first_perturbed = frozenset(pag_layers), x.shape[0] - pag_rows
        if len(text.parts) == 1:
            return self._denoise(x, time, text.parts[0], layers, pag_rows)
        results: list[Tensor] = [x] * len(x)
        for part in text.parts:
            perturbed = sum(row >= first_perturbed for row in part.rows)
            out = self._denoise(x[part.rows, ...], time.of_rows(part.rows), part, layers, perturbed)
            for row, result in zip(part.rows, out.split(1), strict=True):
                results[row] = result
        return torch.cat(results)

    def _denoise(self, x: Tensor, time: TimeCache, text: TextPart, pag_layers: frozenset[int], pag_rows: int) -> Tensor:
        grid = self._grid(x)
        rotary = self.rotary(grid, x.device)
        tokens = self.embed_latents(x, grid)
        for index, (block, table, key_value) in enumerate(zip(self.blocks, time.blocks, text.key_values, strict=True)):
            identity_rows = pag_rows if index in pag_layers else 0
            modulation = table if table.dim() == 3 else table[None]
            tokens = block(tokens, key_value, modulation, text.mask, grid, rotary, identity_rows)
        return unpatchify(self.final_layer(tokens, time.time), grid, self.architecture.patch_size)

    def _cache_rows(self, rows: tuple[int, ...], y: Tensor, mask: Tensor | None) -> TextPart:
        text = self._project_text(y)
        key_values = []
        for block in self.blocks:
            with using(block.cross_attn):
                key, value = block.cross_attn.key_value(text)
            key_values.append((key.contiguous(), value.contiguous()))
        return TextPart(rows, tuple(key_values), mask)
