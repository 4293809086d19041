"""Sizes of tiles: diffusers' names and defaults, what is refused, and pieces that cover a side exactly once."""

import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.tiling import Tiling, cut, grid, make_tiling


def test_names_and_defaults_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    names = list(inspect.signature(diffusers.AutoencoderDC.enable_tiling).parameters)
    assert list(inspect.signature(Autoencoder.enable_tiling).parameters) == names
    theirs = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 6, decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    assert make_tiling(32) == Tiling(*(getattr(theirs, name) for name in names[1:]))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), Tiling(512, 512, 448, 448)),
        ((256,), Tiling(256, 512, 256, 448)),
        ((256, 128, 64), Tiling(256, 128, 64, 128)),
        ((None, None, 1024), Tiling(1024, 512, 1024, 448)),
        ((1024, 1024, 448.0, 896.0), Tiling(1024, 1024, 448, 896)),
    ],
)
def test_sizes_that_are_left_out_fit_those_that_are_given(sizes: tuple, expected: Tiling) -> None:
    made = make_tiling(32, *sizes)
    assert made == expected
    assert all(isinstance(size, int) for size in vars(made).values())


def test_defaults_are_multiples_of_every_factor() -> None:
    assert make_tiling(128) == Tiling(512, 512, 384, 384)
    assert make_tiling(1024) == Tiling(1024, 1024, 1024, 1024)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((500,), r"tile_sample_min_height must be a positive multiple of 32.* not 500: take 512"),
        ((512, 0), r"tile_sample_min_width must be a positive multiple of 32.* not 0: take 32"),
        ((512, 512, -64), "tile_sample_stride_height must be .* not -64"),
        ((512, 512, 64, float("nan")), "tile_sample_stride_width must be .* not nan"),
        ((float("inf"),), "tile_sample_min_height must be .* not inf"),
        ((512, 512, 512, 448.5), "tile_sample_stride_width must be .* not 448.5: take 448"),
        ((256, 256, 512), "tile_sample_stride_height 512 is larger than tile_sample_min_height 256"),
    ],
)
def test_sizes_that_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiling(32, *sizes)


@pytest.mark.parametrize(
    ("height", "width", "cut_"), [(512, 512, False), (513, 32, True), (32, 513, True), (32, 32, False)]
)
def test_one_large_side_is_enough(height: int, width: int, cut_: bool) -> None:
    assert Tiling().applies(height, width) is cut_


@given(units=st.integers(1, 60), most=st.integers(1, 90), unit=st.integers(1, 9))
def test_pieces_cover_a_side_and_are_alike(units: int, most: int, unit: int) -> None:
    spans = cut(units * unit, most, unit)
    assert [spans[0][0], spans[-1][1]] == [0, units * unit]
    assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))
    sizes = [(stop - start) // unit for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(most // unit, 1)
    assert all(start % unit == 0 for start, _ in spans)
    assert len(spans) == -(-units // max(most // unit, 1)), "no fewer would do"


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), pixels=st.integers(1, 900), least=st.integers(0, 3),
    unit=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_tiles_of_a_map_hold_no_more_pixels_than_they_may(
    height: int, width: int, pixels: int, least: int, unit: int
) -> None:
    rows, columns = grid(height * unit, width * unit, pixels, least, unit)
    for spans, size in ((rows, height * unit), (columns, width * unit)):
        assert [spans[0][0], spans[-1][1]] == [0, size]
        assert len(spans) == 1 or min(stop - start for start, stop in spans) >= least, "a halo lies in one neighbour"
    tallest, widest = (max(stop - start for start, stop in spans) for spans in (rows, columns))
    floor = max(2 * least, unit)
    assert tallest * widest <= max(pixels, floor * max(tallest, widest, floor))
