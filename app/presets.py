"""Sizes that the page offers: aspect ratios from the model's own table, bounds of free sizes. No page is here."""

from dataclasses import dataclass

from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.pipelines import inputs

CUSTOM = "Custom"
ASPECTS = {  # as width : height
    "1:1": (1, 1), "4:3": (4, 3), "3:4": (3, 4), "3:2": (3, 2), "2:3": (2, 3), "16:9": (16, 9), "9:16": (9, 16),
}  # fmt: skip
STEP = 32  # pixels between two sizes
LARGEST = 2  # times the model's own side
LARGEST_SQUARE = 4096  # pixels; above it only what the model was trained at
LARGEST_SIDE = 8192  # pixels; of the longest trained shape


@dataclass(frozen=True)
class Presets:
    """The sizes of one model.

    Attributes:
        image_size: side of the square that the model was trained at, in pixels.
        factor: the autoencoder's downsampling factor.
        start: side that the page starts with, in pixels; None for `image_size`.
    """

    image_size: int
    factor: int = 32
    start: int | None = None

    @property
    def smallest(self) -> int:
        """The least width and height, in pixels."""
        return max(STEP, self.factor, _rounded(self.image_size / 4))

    @property
    def greatest(self) -> int:
        """The greatest width and height, in pixels."""
        return min(max(LARGEST * self.image_size, self.first), LARGEST_SIDE)

    @property
    def sides(self) -> list[int]:
        """The sides of squares that the page offers, in pixels, rising."""
        own = self.image_size
        others = (side for side in (own // 2, own * 2) if self.smallest <= side <= LARGEST_SQUARE and side % STEP == 0)
        return sorted({own, self.first, *others})

    @property
    def first(self) -> int:
        """The side that the page starts with, in pixels."""
        return self.image_size if self.start is None else min(max(_rounded(self.start), STEP), LARGEST_SIDE)

    @property
    def trained(self) -> bool:
        """Whether there is a table of trained shapes: then other sizes are made by resizing one of them."""
        return f"ASPECT_RATIO_{self.image_size}_TEST" in ASPECT_RATIOS

    def describe(self, side: int) -> str:
        """Returns what the page calls one of `sides`."""
        if side == self.image_size:
            return f"{side} px, the model's own"
        if not self.trained:
            return f"{side} px, not trained"
        return f"{side} px, {'reduced' if side < self.image_size else 'enlarged'} from {self.image_size}"

    def size(self, aspect: str, side: int) -> tuple[int, int]:
        """Returns (width, height) in pixels of a preset.

        Args:
            aspect: one of `ASPECTS`.
            side: of the square of about the same area; at the model's own side the picture is a shape that it makes
                itself, without resizing.
        """
        width, height = ASPECTS[aspect]
        area = (self.image_size**2 / (width * height)) ** 0.5
        wide, high = (max(STEP, _rounded(part * area)) for part in (width, height))
        if self.trained:
            plan = inputs.plan_size(high, wide, factor=self.factor, image_size=self.image_size, binning=True)
            wide, high = plan.model_width, plan.model_height
        scale = side / self.image_size
        return self._bounded(wide * scale), self._bounded(high * scale)

    def table(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Returns (width, height) of every preset, by side and aspect."""
        return {str(side): {aspect: self.size(aspect, side) for aspect in ASPECTS} for side in self.sides}

    def find(self, width: int, height: int) -> tuple[str, int | None]:
        """Returns the aspect and the side that give a size, or (`CUSTOM`, None)."""
        nearest = sorted(self.sides, key=lambda side: abs(side - self.image_size))
        found = ((aspect, side) for side in nearest for aspect in ASPECTS if self.size(aspect, side) == (width, height))
        return next(found, (CUSTOM, None))

    def _bounded(self, side: float) -> int:
        return min(max(_rounded(side), self.smallest), self.greatest)


def _rounded(side: float) -> int:
    """Returns the nearest multiple of `STEP`."""
    return int(side / STEP + 0.5) * STEP
