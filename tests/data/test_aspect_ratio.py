"""Tables against the recorded official tables, and the nearest ratio against its definition."""

import json

import pytest

from sana.data.aspect_ratio import ASPECT_RATIOS, classify_height_width_bin, closest_ratio
from tests.parity.common import DEFAULT_FOLDER


def test_tables_are_the_official_ones_in_the_official_order() -> None:
    official = json.loads((DEFAULT_FOLDER / "data/aspect_ratio_tables.json").read_text())
    assert list(ASPECT_RATIOS) == list(official)
    for name, table in official.items():
        assert [(ratio, list(size)) for ratio, size in ASPECT_RATIOS[name].items()] == [
            (ratio, [int(side) for side in size]) for ratio, size in table.items()
        ], name


@pytest.mark.parametrize("name", list(ASPECT_RATIOS))
def test_sizes_of_a_table_fall_into_their_own_bin(name: str) -> None:
    for size in set(ASPECT_RATIOS[name].values()):
        found = classify_height_width_bin(*size, ASPECT_RATIOS[name])
        # 2880's first sizes are written with a neighbour's ratio: the shape may then be its neighbour's
        assert found == size or (name == "ASPECT_RATIO_2880" and abs(found[0] / found[1] - size[0] / size[1]) < 0.2)


def test_of_two_equally_near_ratios_the_first_is_taken() -> None:
    assert closest_ratio(3, 2, {"1.0": (1, 1), "2.0": (2, 1)}) == "1.0"
    assert closest_ratio(3, 2, {"2.0": (2, 1), "1.0": (1, 1)}) == "2.0"


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4), (float("nan"), 1)])
def test_a_size_that_is_none_is_refused(size: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        closest_ratio(*size, ASPECT_RATIOS["ASPECT_RATIO_512"])
