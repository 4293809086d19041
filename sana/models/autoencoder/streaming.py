"""An encoder or a decoder of DC-AE run in tiles, with the numbers of the whole run.

Convolutions are run in tiles that are read with the halo they need (`halo.py`). Linear attention sees the whole map,
but through sums of key times value: they are summed over tiles, then every tile of the map is changed in place. So the
memory is that of one map (two where the resolution changes) and of one tile. Sizes of tiles are in `tiling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, product
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sana.models.autoencoder.dc_ae_blocks import ATTENTION_EPS, EfficientViTBlock, LiteMLA, exact_sums
from sana.models.autoencoder.dc_ae_layers import at_least_fp32, is_plain, without_autocast
from sana.models.autoencoder.halo import Chain, chain, halo, reach
from sana.models.autoencoder.tiling import LONG, Span, Tiling, cut, grid
from sana.models.layers.residency import using
from sana.ops.backend import choose

PIECE = 5  # modules after which a tile is cut to what is needed: each piece costs a copy, and saves rows and columns
Function = Callable[[Tensor], Tensor]
Change = Callable[[Tensor, Span, Span], Tensor]  # of a tile, and which rows and columns of it to make
Compiler = Callable[[int, Function], Function]  # number of a piece and what it computes -> what computes it


@dataclass
class Job:
    """What all parts of one run share.

    Attributes:
        layout: memory format of maps and tiles.
        compiler: what may compile the pieces that run in tiles of the image.
        bar: counts tiles.
        order: spans of rows and of columns -> the tiles to make; a memory model leaves out those that are like others.
    """

    layout: torch.memory_format
    compiler: Compiler | None
    bar: tqdm
    order: Callable[[Sequence[Span], Sequence[Span]], Iterable[tuple[Span, Span]]] = product

    def crop(self, x: Tensor, rows: Span, columns: Span) -> Tensor:
        """A tile of a map, copied unless it is all of it."""
        return _part(x, rows, columns).contiguous(memory_format=self.layout)


class Piece:
    """Modules without attention that run as one; a tile is cut to what the next piece needs after each.

    Args:
        units: modules in the order of their run, of which only the first may double the size and the last halve it.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        self.units, self.reach = tuple(units), chain(units)

    def __call__(self, x: Tensor) -> Tensor:
        """All of them."""
        for unit in self.units:
            x = unit(x)
        return x

    def needed(self, span: Span, size: int) -> Span:
        """Which input makes a span of the output: inside the map, from where strides begin to where they end."""
        down = self.reach.down
        start, stop = self.reach.needed(*span)
        return max(start, 0) // down * down, min(-(-stop // down) * down, size)


class Convolutions:
    """A run of modules without attention, in tiles of its output.

    Args:
        units: modules in the order of their run.
        stride: of the tiles in pixels of the image, if the run makes or reads the image; None: tiles of the budget.
    """

    passes = 1  # over all tiles

    def __init__(self, units: Sequence[nn.Module], stride: tuple[int, int] | None = None) -> None:
        self.units, self.pieces = tuple(units), [Piece(piece) for piece in pieces(units)]
        self.reach = Chain(tuple(piece.reach for piece in self.pieces))
        self.stride = stride

    def size(self, size: int) -> int:
        """Pixels of the output along one side of which the input has `size`."""
        return size * self.reach.up // self.reach.down

    def tiles(self, height: int, width: int, factor: int, budget: int) -> tuple[list[Span], list[Span]]:
        """Spans of rows and columns of the output.

        Args:
            height, width: of the input.
            factor: pixels of the image for a pixel of the output.
            budget: numbers that the largest map of a tile may have.
        """
        height, width, up = self.size(height), self.size(width), self.reach.up
        if self.stride is not None:
            return cut(height, self.stride[0] // factor, up), cut(width, self.stride[1] // factor, up)
        pixels = int(budget / self.reach.widest() * up**2 / self.reach.down**2)
        return grid(height, width, pixels, unit=up)

    def run(self, x: Tensor, rows: list[Span], columns: list[Span], job: Job, layout: torch.memory_format) -> Tensor:
        """The whole output, in memory format `layout`, each tile computed alone."""
        height, width = x.shape[2:]
        steps: list[Sequence[Function]] = [piece.units for piece in self.pieces]
        if self.stride is not None and job.compiler is not None:
            steps = [[job.compiler(i, piece)] for i, piece in enumerate(self.pieces)]
        out = None
        for row, column in job.order(rows, columns):
            tile = self._tile(x, self._plan(row, height), self._plan(column, width), steps, job)
            job.bar.update()
            if len(rows) == len(columns) == 1:
                return tile.contiguous(memory_format=layout)
            if out is None:
                shape = (*tile.shape[:2], rows[-1][1], columns[-1][1])
                out = torch.empty(shape, dtype=tile.dtype, device=tile.device, memory_format=layout)
            out[:, :, slice(*row), slice(*column)] = tile
            del tile
        assert out is not None, "a map has a pixel"
        return out

    def _plan(self, span: Span, size: int) -> list[Span]:
        """What each piece reads to make a span along one side, and the span itself; the input has `size` pixels."""
        sizes = [size]
        for piece in self.pieces[:-1]:
            sizes.append(sizes[-1] * piece.reach.up // piece.reach.down)
        spans = [span]
        for piece, length in zip(reversed(self.pieces), reversed(sizes), strict=True):
            spans.insert(0, piece.needed(spans[0], length))
        return spans

    def _tile(
        self, x: Tensor, rows: list[Span], columns: list[Span], steps: list[Sequence[Function]], job: Job
    ) -> Tensor:
        top, left = 0, 0  # where x begins in the whole map
        for i, piece in enumerate(self.pieces):
            x = job.crop(x, _within(rows[i], top), _within(columns[i], left))
            for step in steps[i]:  # here and not in a function of its own, which would keep what it is given
                x = step(x)
            top = rows[i][0] * piece.reach.up // piece.reach.down
            left = columns[i][0] * piece.reach.up // piece.reach.down
        return _part(x, _within(rows[-1], top), _within(columns[-1], left))


class Attention:
    """A block of linear attention and gated convolution; changes the map in place, tile by tile.

    Args:
        block: the block.
    """

    passes = 3  # over all tiles

    def __init__(self, block: EfficientViTBlock) -> None:
        self.block, self.units, self.reach = block, (block,), reach(block)

    def size(self, size: int) -> int:
        """As `Convolutions.size`."""
        return size

    def tiles(self, height: int, width: int, factor: int, budget: int) -> tuple[list[Span], list[Span]]:
        """As `Convolutions.tiles`."""
        return grid(height, width, int(budget / self.reach.widest()), least=halo(self.reach))

    def run(self, x: Tensor, rows: list[Span], columns: list[Span], job: Job, layout: torch.memory_format) -> Tensor:
        """The map after the block, in the memory of `x` if that has the dtype that the block makes."""
        if len(rows) == len(columns) == 1:
            job.bar.update(self.passes)
            return self.block(x).contiguous(memory_format=layout)
        context, local = self.block.context_module, self.block.local_module
        attention, near, sums = cast(LiteMLA, context.main), halo(reach(context)), Sums()
        for row, column in job.order(rows, columns):
            (tall, inner), (wide, across) = _around(row, x.shape[2], near), _around(column, x.shape[3], near)
            sums.add(attention, job.crop(x, tall, wide), inner, across)
            job.bar.update()
        x = _change(x, rows, columns, near, lambda *tile: sums.attend(attention, *tile), job)
        return _change(x, rows, columns, halo(reach(local)), lambda tile, *part: _part(local.main(tile), *part), job)


class Sums:
    """Sums of key times value and of keys over the tokens seen so far, for each scale of one attention layer."""

    def __init__(self) -> None:
        self.scales: list[tuple[Tensor, Tensor]] = []

    def add(self, module: LiteMLA, tile: Tensor, rows: Span, columns: Span) -> None:
        """Adds the tokens of a part of a tile.

        Args:
            module: the layer.
            tile: (B, C, H, W) of its input, with halo.
            rows, columns: the part that counts.
        """
        for i, heads in enumerate(_heads(module, tile, rows, columns)):
            with without_autocast(heads):
                _, key, value = (at_least_fp32(part) for part in heads.unbind(2))
                if choose("auto", tile) == "cpu":
                    key_value, total = exact_sums(key, value)
                else:
                    key = key.relu()
                    key_value, total = torch.matmul(key.transpose(-1, -2), value), key.sum(dim=-2).unsqueeze(-1)
            if i == len(self.scales):
                self.scales.append((key_value, total))
            else:
                self.scales[i][0].add_(key_value)
                self.scales[i][1].add_(total)

    def attend(self, module: LiteMLA, tile: Tensor, rows: Span, columns: Span) -> Tensor:
        """The layer's output for a part of a tile, once all tokens are added; arguments as for `add`."""
        out = None
        for i, heads in enumerate(_heads(module, tile, rows, columns)):  # (B, h, 3, N, d)
            with without_autocast(heads):
                query = at_least_fp32(heads.select(2, 0)).relu()
                key_value, total = (sums.to(query.dtype) for sums in self.scales[i])
                divisor = torch.matmul(query, total).add_(ATTENTION_EPS)
                attended = torch.matmul(query, key_value).div_(divisor)  # (B, h, N, d)
            if out is None:
                batch, parts, tokens, size = attended.shape
                shape, order = (batch, len(self.scales), parts, size, tokens), (0, 1, 2, 3, 4)
                if not tile.is_contiguous():  # channels last
                    shape, order = (batch, tokens, len(self.scales), parts, size), (0, 2, 3, 4, 1)
                out = heads.new_empty(shape).permute(order)
            out[:, i] = attended.transpose(-1, -2)
        assert out is not None, "a layer has a scale"
        return module.proj(out.flatten(1, 3).unflatten(2, (rows[1] - rows[0], columns[1] - columns[0])))


def stream(
    units: Sequence[nn.Module],
    x: Tensor,
    tiling: Tiling,
    *,
    factor: int,
    layout: torch.memory_format = torch.contiguous_format,
    compiler: Compiler | None = None,
    progress: bool | None = None,
    title: str = "",
) -> Tensor:
    """What `units`, one after the other, make of `x`, computed in tiles. Without gradients.

    The first run of convolutions of an encoder and the last one of a decoder are cut as `tiling` says. All else is cut
    so that no map of a tile becomes larger than the largest one there.

    Args:
        units: of an encoder or decoder: convolutions, changes of resolution, and blocks of attention.
        x: (B, C, H, W), images or raw latents.
        tiling: in pixels of the image.
        factor: pixels of the image for one pixel of `x` along a side: 1 for images, more for latents.
        layout: memory format of maps; the result is contiguous.
        compiler: see `Compiler`.
        progress: whether a bar is shown on stderr if there are many tiles; None: if that is a terminal.
        title: of the bar.

    Returns:
        (B, C', H', W') in the dtype that the whole run has.

    Raises:
        TypeError: a unit of another kind.
    """
    parts = _parts(units, tiling, encodes=factor == 1)
    budget = _budget(parts, tiling)
    height, width, cuts = x.shape[2], x.shape[3], []
    for part in parts:
        factor = factor * part.reach.down // part.reach.up
        cuts.append(part.tiles(height, width, factor, budget))
        height, width = part.size(height), part.size(width)
    total = sum(part.passes * len(rows) * len(columns) for part, (rows, columns) in zip(parts, cuts, strict=True))
    short = total - sum(part.passes for part in parts) < LONG  # most parts have one tile
    disable = True if short or progress is False else (None if progress is None else False)
    with torch.no_grad(), tqdm(total=total, desc=title, unit="tile", leave=False, disable=disable) as bar:
        job = Job(layout, compiler, bar)
        for part, (rows, columns) in zip(parts, cuts, strict=True):
            last = part is parts[-1]
            with ExitStack() as weights:
                for unit in part.units:
                    weights.enter_context(using(unit))
                x = part.run(x, rows, columns, job, torch.contiguous_format if last else layout)
    return x


def pieces(units: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Cuts a run of modules before each that enlarges its map, after each that reduces it, and where it is long."""
    runs: list[list[nn.Module]] = [[]]
    for unit in units:
        if reach(unit).up > 1:
            runs.append([])
        runs[-1].append(unit)
        if reach(unit).down > 1:
            runs.append([])
    return [run[start:stop] for run in runs if run for start, stop in cut(len(run), PIECE)]


def _parts(units: Sequence[nn.Module], tiling: Tiling, *, encodes: bool) -> list[Convolutions | Attention]:
    found: list[Convolutions | Attention] = []
    runs = [list(run) for _, run in groupby(units, key=lambda unit: isinstance(unit, EfficientViTBlock))]
    at_the_image = runs[0] if encodes else runs[-1]
    for run in runs:
        if isinstance(run[0], EfficientViTBlock):
            found += [Attention(block) for block in run if isinstance(block, EfficientViTBlock)]
        else:
            stride = (tiling.stride_height, tiling.stride_width) if run is at_the_image else None
            found.append(Convolutions(run, stride))
    return found


def _budget(parts: Sequence[Convolutions | Attention], tiling: Tiling) -> int:
    """Numbers of the largest map of the largest tile of the image, without its halo."""
    part = next(part for part in parts if isinstance(part, Convolutions) and part.stride is not None)
    pixels = tiling.stride_height * tiling.stride_width // part.reach.up**2  # of what the run reads
    return int(part.reach.widest() * pixels)


def _heads(module: LiteMLA, tile: Tensor, rows: Span, columns: Span) -> Iterator[Tensor]:
    """Queries, keys and values of a part of a tile, (B, h, 3, N, d) for each scale."""
    size, qkv = module.head_dim, module.qkv(tile)
    layout = torch.contiguous_format if tile.is_contiguous() else torch.channels_last

    def split(x: Tensor) -> Tensor:
        x = _part(x, rows, columns).contiguous(memory_format=layout)
        return x.flatten(2).unflatten(1, (-1, 3, size)).transpose(-1, -2)

    yield split(qkv)
    for scale in module.aggreg:
        depthwise, grouped = scale.children()
        if choose("auto", tile) == "cpu" and is_plain(grouped):  # as products of matrices, which are faster there
            heads = split(depthwise(qkv))
            yield torch.matmul(heads, grouped.weight.view(-1, 3, size, size).transpose(-1, -2))
        else:
            yield split(scale(qkv))


def _change(
    x: Tensor,
    rows: list[Span],
    columns: list[Span],
    around: int,
    main: Callable[[Tensor, Span, Span], Tensor],
    job: Job,
) -> Tensor:
    """Adds to every tile of `x`, in place, what `main` makes of that tile as it was, with `around` pixels of halo.

    Args:
        x: (B, C, H, W); if `main` makes another dtype, a copy in the dtype of both is changed.
        rows, columns: spans of the tiles, none narrower than `around` where there are several.
        around: pixels.
        main: see `Change`; given the tile with its halo.
        job: of the run.
    """
    above = x[:, :, :0]  # the last rows above this row of tiles, as they were
    for row in rows:
        below = x[:, :, max(row[1] - around, 0) : row[1]].clone()
        left = x[:, :, row[0] : row[1], :0]  # the last columns to the left of this tile, as they were
        for column in columns:
            (tall, inner), (wide, across) = _around(row, x.shape[2], around), _around(column, x.shape[3], around)
            tile = _part(x, tall, wide).clone(memory_format=job.layout)
            if inner[0]:
                tile[:, :, : inner[0]] = above[:, :, above.shape[2] - inner[0] :, slice(*wide)]
            if across[0]:
                tile[:, :, inner[0] : inner[1], : across[0]] = left[..., left.shape[3] - across[0] :]
            left = x[:, :, row[0] : row[1], max(column[1] - around, 0) : column[1]].clone()
            out = main(tile, inner, across)
            if out.dtype != x.dtype:  # only the first tile finds this
                x = x.to(torch.promote_types(out.dtype, x.dtype))
            x[:, :, slice(*row), slice(*column)] += out
            job.bar.update()
        above = below
    return x


def _around(span: Span, size: int, halo: int) -> tuple[Span, Span]:
    """A span with as much halo as a map of `size` has, and where in that the span is."""
    start, stop = max(span[0] - halo, 0), min(span[1] + halo, size)
    return (start, stop), _within(span, start)


def _within(span: Span, origin: int) -> Span:
    return span[0] - origin, span[1] - origin


def _part(x: Tensor, rows: Span, columns: Span) -> Tensor:
    return x[:, :, slice(*rows), slice(*columns)]
