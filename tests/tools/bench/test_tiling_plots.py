"""The picture of the curves: drawn from what the file holds, also where a side was not measured."""

import builtins

import pytest

from tools.bench.plots import PlotError
from tools.bench.tiling_plots import draw


def content(sides: tuple[str, ...]) -> dict:
    points = [
        {"side": side, "tile": tile, "seconds": 1.0, "peak_bytes": 2**24, "rms": 1e-7 * bool(tile), "most": 0.0}
        for side in sides for tile in (0, 128, 448)
    ]  # fmt: skip
    curves = [
        {"network": network, "direction": direction, "pixels": 1024, "dtype": "fp32", "points": points}
        for network in ("bundled", "f32c32") for direction in ("decode", "encode")
    ]  # fmt: skip
    versions = {"torch": "2", "diffusers": "0"}
    about = {"name": "a machine", "cores": 2, "versions": versions, "commit": "abc", "date": "today"}
    return {"environment": about, "curves": curves}


@pytest.mark.parametrize("sides", [("ours", "diffusers"), ("ours",)])
def test_a_picture_is_drawn(tmp_path, sides: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    draw(content(sides), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_without_matplotlib_it_is_said_what_to_install(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def stand_in(name: str, *rest: object):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", stand_in)
    with pytest.raises(PlotError, match=r"sana-python\[plot\]"):
        draw(content(("ours",)), tmp_path / "curves.png")
