"""Tiled runs of an autoencoder on tensors without storage: of tiles that are alike, one is run.

A tile's memory depends on how much it reads and on which sides have a halo, and the maps around it stay as large as
they are: so of every row and column of tiles the first, the inner one that reads most, and the last say all. Of a run
of convolutions the first tile counts, since its output comes later, and the tile that reads most; of blocks of
attention that are alike, the first one.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sana.models.autoencoder.dc_ae import layout_of
from sana.models.autoencoder.streaming import Attention, Convolutions, Job, _budget, _parts
from sana.models.autoencoder.tiling import Span, Tiling
from sana.models.layers.residency import using


def set_tiling(autoencoder: Any, tiling: Tiling | None) -> None:
    """Makes an autoencoder without weights cut pictures so; None: it does every picture whole, large ones too.

    Raises:
        NotImplementedError: the autoencoder has no exact tiles.
    """
    autoencoder.disable_tiling()
    if tiling is None:
        return
    if not autoencoder.tiles_exactly:
        raise NotImplementedError(f"The memory of a tiled {type(autoencoder).__name__} is not predicted.")
    autoencoder.enable_tiling(tiling.height, tiling.width, tiling.stride_height, tiling.stride_width)
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    factor = autoencoder.downsample_factor

    def raw_encode_tiled(images: Tensor, tiling: Tiling) -> Tensor:
        return stream(encoder.units(), images, tiling, factor=1, layout=layout_of(encoder, images))

    def raw_decode_tiled(latents: Tensor, tiling: Tiling) -> Tensor:
        return stream(decoder.units(), latents, tiling, factor=factor, layout=layout_of(decoder, latents))

    autoencoder.raw_encode_tiled, autoencoder.raw_decode_tiled = raw_encode_tiled, raw_decode_tiled


def stream(
    units: Sequence[nn.Module], x: Tensor, tiling: Tiling, *, factor: int, layout: torch.memory_format
) -> Tensor:
    """`sana.models.autoencoder.streaming.stream` without the tiles that are like others; the same memory."""
    parts = _parts(units, tiling, encodes=factor == 1)
    budget = _budget(parts, tiling)
    height, width = x.shape[2:]
    run: list[tuple[Convolutions | Attention, tuple[list[Span], list[Span]]]] = []
    for part in parts:
        factor = factor * part.reach.down // part.reach.up
        rows, columns = part.tiles(height, width, factor, budget)
        cut = thin(rows, reads(part, height)), thin(columns, reads(part, width))
        if isinstance(part, Attention):  # in place, so that no last tile is needed to know the size
            cut = cut[0][:2], cut[1][:2]
        if part is parts[-1] or not (run and alike(part, run[-1][0])):
            run.append((part, cut))
        height, width = part.size(height), part.size(width)
    job = Job(layout, None, tqdm(disable=True), order=decisive)
    for part, (rows, columns) in run:
        with ExitStack() as weights:
            for unit in part.units:
                weights.enter_context(using(unit))
            x = part.run(x, rows, columns, job, torch.contiguous_format if part is parts[-1] else layout)
    return x


def decisive(rows: Sequence[Span], columns: Sequence[Span]) -> list[tuple[Span, Span]]:
    """Returns the first tile, and of the later ones those that may read most."""
    later = [spans[1:2] if len(spans) == 3 else spans for spans in (rows, columns)]  # an inner one has two halos
    first = (rows[0], columns[0])
    return [first, *(tile for tile in product(later[0], later[1]) if tile != first)]


def alike(part: Convolutions | Attention, other: Convolutions | Attention) -> bool:
    """Whether two parts that follow one another are blocks of attention of one shape."""
    if not (isinstance(part, Attention) and isinstance(other, Attention)):
        return False
    return [one.shape for one in part.block.parameters()] == [one.shape for one in other.block.parameters()]


def reads(part: Convolutions | Attention, size: int) -> Callable[[Span], tuple[int, ...]]:
    """Returns what orders the spans of a part's output by the work of their tiles; the input has `size` pixels."""

    def work(span: Span) -> tuple[int, ...]:
        planned = part._plan(span, size) if isinstance(part, Convolutions) else [span]
        return sum(stop - start for start, stop in planned), min(span[0], size - span[1])

    return work


def thin(spans: Sequence[Span], work: Callable[[Span], tuple[int, ...]]) -> list[Span]:
    """The first span, the inner one with most work, and the last."""
    inner = spans[1:-1]
    return [*spans[:1], *([max(inner, key=work)] if inner else []), *(spans[-1:] if len(spans) > 1 else [])]
