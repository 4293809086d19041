"""Tables of the image sizes that models are trained on, by height / width ratio, and how a size is assigned to one.

A table maps the ratio, written as the text it had in training ("0.68"), to (height, width) in pixels. Names and entries
are the official ones. Nothing is resized here.
"""

from collections.abc import Iterable, Mapping

Size = tuple[int, int]
Table = Mapping[str, Size]

_SIZES_1024: tuple[Size, ...] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)),
    *((1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640)),
    *((1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)),
)
_SIZES_2880: tuple[Size, ...] = (
    *((1408, 5760), (1408, 5568), (1408, 5376), (1408, 5184), (1600, 4992), (1600, 4800), (1600, 4672), (1792, 4480)),
    *((1792, 4288), (1920, 4096), (1920, 3904), (1920, 3776), (2112, 3840), (2112, 3584), (2304, 3392), (2304, 3200)),
    *((2496, 3200), (2496, 3008), (2688, 3008), (2688, 2880), (2880, 2880), (2880, 2688), (3008, 2688), (3008, 2496)),
    *((3200, 2496), (3200, 2304), (3392, 2304), (3584, 2112), (3840, 2112), (3904, 1920), (4096, 1920), (4288, 1792)),
    *((4480, 1792), (4672, 1600), (4800, 1600), (4992, 1600), (5184, 1408), (5376, 1408), (5568, 1408), (5760, 1408)),
)
# The ratios that the 2880 table writes are not those of its sizes at the ends (1408 / 5760 = 0.24).
_WRITTEN_2880 = {0: "0.25", 1: "0.26", 2: "0.27", 3: "0.28", 39: "4.0"}


def _table(sizes: Iterable[Size], scale: float = 1.0, written: Mapping[int, str] | None = None) -> dict[str, Size]:
    written = written or {}
    return {
        written.get(index, str(round(height / width, 2))): (int(height * scale), int(width * scale))
        for index, (height, width) in enumerate(sizes)
    }


def _without(table: Table, *ratios: str) -> dict[str, Size]:
    return {ratio: size for ratio, size in table.items() if ratio not in ratios}


_LONG = ("0.27", "2.89", "3.11", "3.62", "3.75", "3.88")  # left out for inference
_TEST_1024 = _without(_table(_SIZES_1024), "0.26", *_LONG)

ASPECT_RATIOS: dict[str, dict[str, Size]] = {
    "ASPECT_RATIO_4096": _table(_SIZES_1024, 4),
    "ASPECT_RATIO_2880": _table(_SIZES_2880, 1, _WRITTEN_2880),
    "ASPECT_RATIO_2048": _table(_SIZES_1024, 2),
    "ASPECT_RATIO_1024": _table(_SIZES_1024),
    "ASPECT_RATIO_512": _table(_SIZES_1024, 0.5),
    "ASPECT_RATIO_256": _table(_SIZES_1024, 0.25),
    "ASPECT_RATIO_256_TEST": {ratio: (height // 4, width // 4) for ratio, (height, width) in _TEST_1024.items()},
    "ASPECT_RATIO_512_TEST": {ratio: (height // 2, width // 2) for ratio, (height, width) in _TEST_1024.items()},
    "ASPECT_RATIO_1024_TEST": _TEST_1024,
    "ASPECT_RATIO_2048_TEST": _without(_table(_SIZES_1024, 2), "0.28", *_LONG),
    # Officially the 2880 table for inference holds 4096's sizes; kept, so that sizes agree.
    "ASPECT_RATIO_2880_TEST": _without(_table(_SIZES_1024, 4), "0.28", *_LONG),
    "ASPECT_RATIO_4096_TEST": _table(_SIZES_1024, 4),
    "ASPECT_RATIO_1280_TEST": {"1.0": (1280, 1280)},
    "ASPECT_RATIO_1536_TEST": {"1.0": (1536, 1536)},
    "ASPECT_RATIO_768_TEST": {"1.0": (768, 768)},
}


def closest_ratio(height: float, width: float, table: Table) -> str:
    """Returns the table's ratio nearest to height / width, as the table writes it; of two equally near, the first.

    Args:
        height: of the image, in any unit, positive.
        width: in the same unit, positive.
        table: one of `ASPECT_RATIOS`.

    Raises:
        ValueError: a side is not positive.
    """
    if not (height > 0 and width > 0):
        raise ValueError(f"Height and width must be positive, not {height} and {width}.")
    ratio = float(height / width)
    return min(table, key=lambda written: abs(float(written) - ratio))


def classify_height_width_bin(height: float, width: float, table: Table) -> Size:
    """Returns the table's (height, width) whose ratio is nearest to that of an image; see `closest_ratio`."""
    return table[closest_ratio(height, width, table)]
