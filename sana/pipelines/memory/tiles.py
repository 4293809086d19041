"""Tiled runs of an autoencoder on tensors without storage: of tiles that are alike, one is run.

A tile's memory depends on how much it reads and on which sides have a halo, and the maps around it stay as large as
they are: so of every row and column of tiles the first, the inner one that reads most, and the last say all.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
    height, width, cuts = x.shape[2], x.shape[3], []
    for part in parts:
        factor = factor * part.reach.down // part.reach.up
        rows, columns = part.tiles(height, width, factor, budget)
        cuts.append((thin(rows, reads(part, height)), thin(columns, reads(part, width))))
        height, width = part.size(height), part.size(width)
    job = Job(layout, None, tqdm(disable=True))
    for part, (rows, columns) in zip(parts, cuts, strict=True):
        last = part is parts[-1]
        with ExitStack() as weights:
            for unit in part.units:
                weights.enter_context(using(unit))
            x = part.run(x, rows, columns, job, torch.contiguous_format if last else layout)
    return x


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
