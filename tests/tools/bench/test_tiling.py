"""The benchmark of tiles: exact ones of ours beside diffusers' blended ones, peaks that fall, three files."""

import json

import pytest
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from tools.bench import tiling
from tools.bench.harness import Case
from tools.bench.setting import Setting

QUICK = Setting("quick", "cpu")


def small_network(name: str, device: str, dtype: torch.dtype = torch.float32) -> DCAE:
    """Attention and convolutions at the scales of the real ones, a few channels wide."""
    torch.manual_seed(0)
    widths, blocks = (8, 8, 16, 16, 16, 16), ("ResBlock",) * 4 + ("EViT_GLU",) * 2
    config = DCAEConfig(
        latent_channels=4, head_dim=8, encoder_width_list=widths, encoder_depth_list=(0, 1, 1, 1, 1, 1),
        encoder_block_type=blocks, decoder_width_list=widths, decoder_depth_list=(0, 1, 1, 1, 1, 1),
        decoder_block_type=blocks,
    )  # fmt: skip
    return DCAE(config).to(device, dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("direction", [tiling.DECODE, tiling.ENCODE])
def test_default_tiles_are_compared_with_the_whole_and_with_diffusers(direction: str) -> None:
    pytest.importorskip("diffusers")
    comparison = tiling.build_comparison(QUICK, direction, 544)
    checks = comparison.check()
    assert list(checks) == ["ours, whole"] and checks["ours, whole"].passed
    assert comparison.facts["diffusers"]["rms_ratio"] > 1e-3, "blended tiles do not know of each other"
    ours, whole, theirs = (side.run() for side in comparison.sides)
    assert ours.shape == whole.shape == theirs.shape
    assert (ours - theirs).abs().max() > (ours - whole).abs().max()


def test_cases_are_of_the_bundled_one() -> None:
    cases = tiling.cases(QUICK)
    assert all(isinstance(case, Case) for case in cases)
    assert [case.key for case in cases] == ["tiling.decode", "tiling.encode"]


def test_a_run_writes_curves_a_table_and_a_picture(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tiling, "network_of", small_network)
    command = ["--suite", "cpu", "--bundled", "576", "--full", "544", "--directions", "decode", "--output"]
    assert tiling.main([*command, str(tmp_path)]) == 0
    (file,) = tmp_path.glob("tiling-*.json")
    curves = json.loads(file.read_text())["curves"]
    assert [(curve["network"], curve["pixels"]) for curve in curves] == [("bundled", 576), ("f32c32", 544)]
    for curve in curves:
        points = {(point["side"], point["tile"]): point for point in curve["points"]}
        assert list(points) == [(tiling.OURS, tile) for tile in (0, 128, 256, 448)] + [
            (tiling.THEIRS, 0), (tiling.THEIRS, 448)
        ]  # fmt: skip
        ours = [points[tiling.OURS, tile] for tile in (128, 256, 448, 0)]
        assert all(point["rms"] <= 1e-6 for point in ours)
        assert points[tiling.THEIRS, 448]["rms"] > 1e-3
        peaks = [point["peak_bytes"] for point in ours]
        assert peaks[0] < peaks[1] < peaks[-1] and peaks[2] < peaks[-1]
        assert all(point["seconds"] > 0 for point in curve["points"])
    table = file.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out.removesuffix("\n")
    assert table.count("| ours | whole |") == 2 and "--bundled 576" in table
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("size", ["100", "300"])
def test_sizes_that_are_refused(size: str, capsys) -> None:
    with pytest.raises(SystemExit):
        tiling.main(["--full", size])
    assert "multiples of 32 from 256 on" in capsys.readouterr().err


def test_the_largest_tile_is_smaller_than_the_image() -> None:
    assert tiling.tiles_of(448) == [128, 256]
    assert tiling.tiles_of(4096) == list(tiling.TILES)


def test_errors_are_relative_to_the_whole() -> None:
    whole = torch.tensor([0.0, 2.0, -2.0])
    assert tiling.errors(whole, whole) == (0, 0)
    assert tiling.errors(whole + torch.tensor([0.0, 0.0, 0.4]), whole) == pytest.approx((0.4 / 8**0.5, 0.1))
