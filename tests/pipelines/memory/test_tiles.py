"""Of tiles that are alike one says all: the same peak as all of them."""

from itertools import product

import pytest
import torch

from sana.models.autoencoder.tiling import Tiling, cut
from sana.pipelines.loading import find_model, source_config
from sana.pipelines.memory import tiles
from sana.pipelines.memory.stages import MemoryModel


@pytest.mark.parametrize(
    ("stage", "device"), [pytest.param("decode", "cuda", marks=pytest.mark.slow), ("encode", "cpu")]
)
def test_thinned_tiles_have_the_peak_of_all(stage, device, monkeypatch) -> None:
    model = MemoryModel(source_config(find_model("asset/models/sana_tiny")), device=device, dtype=torch.float32)
    tiling = Tiling(64, 64, 64, 64)
    thinned = getattr(model, stage)(256, 256, 1, tiling=tiling)
    monkeypatch.setattr(tiles, "thin", lambda spans, work: list(spans))
    monkeypatch.setattr(tiles, "decisive", lambda rows, columns: list(product(rows, columns)))
    monkeypatch.setattr(tiles, "alike", lambda part, other: False)
    assert getattr(model, stage)(256, 256, 1, tiling=tiling) == thinned


@pytest.mark.parametrize(("stage", "device"), [("decode", "cuda"), ("decode", "cpu"), ("encode", "cuda")])
def test_a_few_tiles_of_every_run_have_the_peak_of_all(stage, device, monkeypatch) -> None:
    model = MemoryModel(source_config(find_model("asset/models/sana_tiny")), device=device, dtype=torch.float32)
    sizes = [(256, 256, 64), (160, 512, 96), (256, 256, 128), (64, 320, 128)]
    few = [getattr(model, stage)(height, width, 1, tiling=Tiling(*[side] * 4)) for height, width, side in sizes]
    monkeypatch.setattr(tiles, "decisive", lambda rows, columns: list(product(rows, columns)))
    monkeypatch.setattr(tiles, "alike", lambda part, other: False)
    assert few == [getattr(model, stage)(height, width, 1, tiling=Tiling(*[side] * 4)) for height, width, side in sizes]


def test_thin_keeps_both_ends_and_the_inner_one_with_most_work() -> None:
    def work(span: tuple[int, int]) -> tuple[int]:
        return (span[1] - span[0],)

    assert tiles.thin([(0, 9)], work) == [(0, 9)]
    assert tiles.thin([(0, 4), (4, 9)], work) == [(0, 4), (4, 9)]
    spans = cut(100, 11)
    kept = tiles.thin(spans, work)
    assert (kept[0], kept[-1], len(kept)) == (spans[0], spans[-1], 3)
    assert work(kept[1]) == max(work(span) for span in spans)


def test_tiles_bound_the_memory() -> None:
    model = MemoryModel(source_config(find_model("asset/models/sana_tiny")), device="cuda", dtype=torch.float32)
    whole = model.decode(512, 512, 1)
    large, small = (model.decode(512, 512, 1, tiling=Tiling(side, side, side, side)) for side in (256, 128))
    assert small < large < whole


def test_an_autoencoder_without_exact_tiles_is_refused() -> None:
    class Other:
        tiles_exactly = False

        def disable_tiling(self) -> None:
            self.tiling = None

    tiles.set_tiling(Other(), None)
    with pytest.raises(NotImplementedError, match="The memory of a tiled Other is not predicted"):
        tiles.set_tiling(Other(), Tiling())
