"""Tiled runs of an autoencoder on tensors without storage: of tiles that are alike, one is run.

A tile's memory depends on its size and on which sides have a halo, and the maps around it stay as large as they are: so
of every row and column of tiles the first, the largest inner one and the last say all.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sana.models.autoencoder.dc_ae import layout_of
from sana.models.autoencoder.streaming import Job, _budget, _parts
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
        cuts.append((thin(rows), thin(columns)))
        height, width = part.size(height), part.size(width)
    job = Job(layout, None, tqdm(disable=True))
    for part, (rows, columns) in zip(parts, cuts, strict=True):
        last = part is parts[-1]
        with ExitStack() as weights:
            for unit in part.units:
                weights.enter_context(using(unit))
            x = part.run(x, rows, columns, job, torch.contiguous_format if last else layout)
    return x


def thin(spans: Sequence[Span]) -> list[Span]:
    """The first span, the largest inner one and the last."""
    inner = spans[1:-1]
    largest = [max(inner, key=lambda span: span[1] - span[0])] if inner else []
    return [*spans[:1], *largest, *(spans[-1:] if len(spans) > 1 else [])]
