"""Chooses the settings that fit into a given amount of memory and do the least harm, or says what would fit.

Numbers come from `plan_stages.py`. The order of harm is documented at `search`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sana.pipelines import inputs
from sana.pipelines.plan_request import AUTO, NONE, OFFLOADS, Job, format_memory, with_size
from sana.pipelines.plan_stages import DECODE, DENOISE, ENCODE, TEXT, Estimator, Settings, Stage

TILES = (2048, 1536, 1024, 768, 512, 384, 256, 128)  # pixels; halos cost more the smaller a tile is
SMALLER = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # of the sides, when nothing fits
EIGHT_BITS = "int8"
FOUR_BITS = "nf4"  # runs on CUDA and on a CPU
MIN_SIDE = 256  # pixels of a smaller picture worth proposing


class MemoryLimitError(RuntimeError):
    """Nothing that the planner may choose fits; the message says what is needed, what is allowed and what would fit.

    Attributes:
        needed: bytes that the settings which need least need.
        allowed: bytes, the margin taken off.
        stage: the one that needs them.
    """

    def __init__(self, message: str, *, needed: int, allowed: int, stage: str) -> None:
        super().__init__(message)
        self.needed, self.allowed, self.stage = needed, allowed, stage

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, amounts in bytes."""
        numbers = {"needed": self.needed, "allowed": self.allowed, "decisive": self.stage}
        return {"fits": False, **numbers, "message": str(self)}


@dataclass(frozen=True)
class Placement:
    """Where weights lie, and whether a CPU keeps packed copies of them."""

    offload: str
    packing: bool = False


def search(estimate: Estimator) -> Settings:
    """Returns the settings that fit and do the least harm. What the caller fixed is never changed.

    The order, from what costs nothing to what changes pictures:

    1. Exact and free: the decoder takes the pictures of a batch one by one, then tiles, from large to small ones.
    2. Exact and cheap: networks that do not run leave the device ("model" offload). On a CPU: no packed copies of
       weights (those make it faster).
    3. Exact, little slower: fewer pictures a call, as many as fit, spread evenly over the calls.
    4. Exact, slower: blocks come one after another with the next one on its way ("group" offload), with as many
       pictures a call as fit; then one unit at a time ("sequential").
    5. Inexact: int8 weights of the text encoder, then of the transformer too, then four bits of the text encoder, then
       of both. With each, steps 1 to 4 anew. fp8 and dynamic int8 are taken only where the caller asks for them.

    Without a bound the settings are the caller's, and for "auto" what the pipeline does by itself.

    Raises:
        MemoryLimitError: nothing fits.
    """
    limit = estimate.job.request.limit
    if limit is None:
        return default_settings(estimate.job)
    found = _search(estimate, limit)
    if found is None:
        raise refusal(estimate, limit)
    return found


def default_settings(job: Job) -> Settings:
    """Returns what the caller fixed, and for the rest what the pipeline does by itself."""
    request = job.request
    return Settings(
        batch=request.batch,
        tile=own_tile(job) if request.tiling == AUTO else _fixed_tile(request.tiling),
        offload=NONE if request.offload == AUTO else request.offload,
        quantization=_scheme(request.quantization),
        text_quantization=_scheme(request.text_quantization) if job.text_encoder else None,
        packing=job.packing,
    )


def least(estimate: Estimator) -> tuple[Settings, Stage]:
    """Returns the settings that need least of all that the planner may choose, and the stage that decides."""
    best: tuple[Settings, Stage] | None = None
    batch = 1 if estimate.job.request.split else estimate.job.request.batch
    for settings in _rungs(estimate.job):
        for group in placements(estimate.job):
            for place in group:
                tried = replace(settings, batch=batch, offload=place.offload, packing=place.packing)
                tile, slicing = decodings(estimate.job, batch)[-1]
                tried = replace(tried, tile=tile, slicing=slicing)
                worst = estimate.worst(tried)
                if best is None or worst.total < best[1].total:
                    best = tried, worst
    assert best is not None
    return best


def own_tile(job: Job) -> int | None:
    """Returns the side of the tiles that an autoencoder takes by itself, None where it takes whole pictures."""
    from sana.models.autoencoder.tiling import AUTO_TILE_PIXELS, make_tiling

    large = job.size.model_height * job.size.model_width > AUTO_TILE_PIXELS
    return make_tiling(job.factor).stride_height if large else None


def _fixed_tile(tiling: int | str) -> int | None:
    return None if tiling in (AUTO, NONE) else int(tiling)


def placements(job: Job) -> tuple[tuple[Placement, ...], ...]:
    """Returns where weights may lie, in the order of cost; a smaller batch is tried within a group before the next."""
    request = job.request
    if request.device == "cpu":
        choices = [packing for packing in (True, False) if packing == job.packing or request.packing == AUTO]
        return (tuple(Placement(NONE, packing) for packing in choices if job.packing or not packing),)
    groups = (OFFLOADS[:2], OFFLOADS[2:3], OFFLOADS[3:])
    allowed = [
        tuple(Placement(one) for one in group if request.offload in (AUTO, one)) for group in groups
    ]  # fmt: skip
    return tuple(group for group in allowed if group)


def decodings(job: Job, batch: int) -> tuple[tuple[int | None, bool], ...]:
    """Returns (tile, slicing) in the order of cost. A CPU decodes the pictures of a batch one by one anyway."""
    request = job.request
    sliced = batch > 1 and request.device != "cpu"
    tiles = [_fixed_tile(request.tiling)]
    if request.tiling == AUTO:
        longest = max(job.size.model_height, job.size.model_width)
        tiles = [None, *(tile for tile in TILES if tile < longest and tile % job.factor == 0)]
    one_by_one = ((tiles[0], True),) if sliced and tiles[0] is None else ()  # as tiles are anyway
    return ((tiles[0], False), *one_by_one, *((tile, False) for tile in tiles[1:]))


def _search(estimate: Estimator, limit: int) -> Settings | None:
    for rung in _rungs(estimate.job):
        for group in placements(estimate.job):
            found = _in_group(estimate, limit, rung, group)
            if found is not None:
                return found
    return None


def _in_group(estimate: Estimator, limit: int, rung: Settings, group: tuple[Placement, ...]) -> Settings | None:
    """Tries the whole batch with each placement of a group, then the greatest smaller one."""

    def fitting(batch: int) -> Settings | None:
        for place in group:
            tried = replace(rung, batch=batch, offload=place.offload, packing=place.packing)
            found = _with_decoding(estimate, limit, tried)
            if found is not None:
                return found
        return None

    request = estimate.job.request
    whole = fitting(request.batch)
    if whole is not None or not request.split or request.batch == 1:
        return whole
    most = greatest(request.batch - 1, lambda batch: fitting(batch) is not None)
    if most == 0:
        return None
    calls = -(-request.batch // most)
    return fitting(-(-request.batch // calls)) or fitting(most)


def _with_decoding(estimate: Estimator, limit: int, settings: Settings) -> Settings | None:
    """Returns the settings with the first way of decoding that fits, and of encoding where there is any.

    No stage is asked for that cannot fit.
    """
    for name in (TEXT, DENOISE):
        if name in estimate.stages and not _fits(estimate, limit, name, settings):
            return None
    ways = [replace(settings, tile=tile, slicing=slicing) for tile, slicing in decodings(estimate.job, settings.batch)]
    if sum(estimate.resident(DECODE, settings).values()) > limit:
        return None

    def needs(way: Settings) -> int:
        return max(estimate.stage(name, way).total for name in (ENCODE, DECODE) if name in estimate.stages)

    whole, tiled = [way for way in ways if way.tile is None], [way for way in ways if way.tile is not None]
    for way in whole:
        if needs(way) <= limit:
            return way
    longest = max(estimate.job.size.model_height, estimate.job.size.model_width)
    known = [(longest**2, needs(way)) for way in whole[-1:]]
    found = first_fitting([int(way.tile or 0) ** 2 for way in tiled], lambda index: needs(tiled[index]), limit, known)
    return None if found is None else tiled[found]


def _fits(estimate: Estimator, limit: int, name: str, settings: Settings) -> bool:
    resident = sum(estimate.resident(name, settings).values())
    return resident <= limit and resident + estimate.peak(name, settings) <= limit


def first_fitting(
    areas: Sequence[int], needs: Callable[[int], int], limit: int, known: Sequence[tuple[int, int]] = ()
) -> int | None:
    """Returns the first index whose need is within the limit, where every later one needs no more; None if none is.

    As a search by halves, but the next index is guessed from what is known, for every question takes a second.

    Args:
        areas: of the tiles by index, falling; what they need falls about linearly with them.
        needs: index -> bytes.
        limit: bytes.
        known: pairs of an area and its need, beyond those of `areas`.
    """
    low, high, points = 0, len(areas), list(known)
    while low < high:
        index = min(max(_guess(areas, points, limit), low), high - 1)
        points.append((areas[index], needs(index)))
        if points[-1][1] <= limit:
            high = index
        else:
            low = index + 1
    return low if low < len(areas) else None


def _guess(areas: Sequence[int], points: Sequence[tuple[int, int]], limit: int) -> int:
    """Returns the index of the largest area that fits, if needs lie on a line through the last two points."""
    if len(points) < 2:
        return 0
    (area, need), (other, others) = points[-2:]
    if need == others:
        return len(areas) // 2
    most = area + (limit - need) * (other - area) / (others - need)
    return next((index for index, one in enumerate(areas) if one <= most), len(areas) - 1)


def greatest(high: int, fits: Callable[[int], bool]) -> int:
    """Returns the greatest number in [1, high] that fits, 0 if none does, where every smaller one fits as well."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rungs(job: Job) -> Iterator[Settings]:
    """Yields the quantisations that may be chosen, from exact to coarse."""
    request, seen = job.request, set()
    ladder = (
        (None, None), (None, EIGHT_BITS), (EIGHT_BITS, EIGHT_BITS), (EIGHT_BITS, FOUR_BITS), (FOUR_BITS, FOUR_BITS),
    )  # fmt: skip
    for transformer, text in ladder:
        chosen = (
            transformer if request.quantization == AUTO else _scheme(request.quantization),
            (text if request.text_quantization == AUTO else _scheme(request.text_quantization))
            if job.text_encoder
            else None,
        )
        if chosen not in seen:
            seen.add(chosen)
            yield Settings(quantization=chosen[0], text_quantization=chosen[1])


def _scheme(name: str | None) -> str | None:
    return None if name in (AUTO, NONE, None) else name


def refusal(estimate: Estimator, limit: int) -> MemoryLimitError:
    """Returns the error that says in one sentence what is needed, what is allowed and which settings would fit."""
    job = estimate.job
    settings, stage = least(estimate)
    ways = [f"with max_vram {format_memory(stage.total + job.request.margin_bytes, up=True)}"]
    if opened := _opened(estimate, limit):
        ways.append(f"with {opened}")
    if smaller := _smaller(estimate, limit):
        ways.append(smaller)
    margin = f" (a margin of {format_memory(job.request.margin_bytes)} taken off)" if job.request.margin_bytes else ""
    message = (
        f"{_pictures(job)} does not fit into {format_memory(limit)}{margin}: {stage.name} needs "
        f"{format_memory(stage.total, up=True)} even with {describe(settings, job)}; it fits {', or '.join(ways)}."
    )
    return MemoryLimitError(message, needed=stage.total, allowed=limit, stage=stage.name)


def _opened(estimate: Estimator, limit: int) -> str:
    """Returns the settings that the caller fixed and that would have to change, or "" where that does not help."""
    request = estimate.job.request
    fixed = {"tiling", "offload", "quantization", "text_quantization", "packing"}
    changes: dict[str, Any] = {
        one.name: AUTO for one in fields(request) if one.name in fixed and getattr(request, one.name) != AUTO
    }
    free = replace(request, **changes, split=True)
    if free == request:
        return ""
    found = _search(estimate.for_job(replace(estimate.job, request=free)), limit)
    if found is None:
        return ""
    fixed_values = {name: str(getattr(request, name) or NONE).lower() for name in changes}
    words = [f"{name} {value}" for name, value in as_options(found).items() if fixed_values.get(name, value) != value]
    return ", ".join([*words, *([] if request.split or found.batch == request.batch else ["split true"])])


def _smaller(estimate: Estimator, limit: int) -> str:
    """Returns the nearest smaller size that fits and what it needs, or ""."""
    job, factor = estimate.job, estimate.job.factor
    for share in SMALLER:
        height, width = (round(side * share / factor) * factor for side in (job.size.height, job.size.width))
        if min(height, width) < max(MIN_SIDE, factor) or (job.small and height * width <= math.prod(job.small)):
            return ""
        smaller = estimate.for_job(with_size(job, height, width))
        found = _search(smaller, limit) if _may_fit(smaller, limit) else None
        if found is not None:
            exactly = "" if _made_so(job, height, width) else " without resolution binning"
            return f"as {height}x{width}{exactly} at {format_memory(smaller.worst(found).total, up=True)}"
    return ""


def _may_fit(estimate: Estimator, limit: int) -> bool:
    """Whether the coarsest settings fit, so that finer ones are worth the seconds that a search takes."""
    coarsest = list(_rungs(estimate.job))[-1]
    place = placements(estimate.job)[-1][-1]
    batch = 1 if estimate.job.request.split else estimate.job.request.batch
    tile, slicing = decodings(estimate.job, batch)[-1]
    settings = replace(coarsest, batch=batch, tile=tile, slicing=slicing, offload=place.offload, packing=place.packing)
    return all(_fits(estimate, limit, name, settings) for name in estimate.stages)


def _made_so(job: Job, height: int, width: int) -> bool:
    """Whether the pipeline makes this very size, with the request's binning."""
    binning = job.request.use_resolution_binning
    return not inputs.plan_size(height, width, factor=job.factor, image_size=job.image_size, binning=binning).binned


def _pictures(job: Job) -> str:
    count = job.request.batch
    return f"{job.size.height}x{job.size.width}" + (f", {count} pictures," if count > 1 else "")


def as_options(settings: Settings) -> dict[str, str]:
    """Returns settings by the names and values that a command line has for them."""
    return {
        "tiling": str(settings.tile or NONE),
        "offload": settings.offload,
        "quantization": settings.quantization or NONE,
        "text_quantization": settings.text_quantization or NONE,
        "packing": str(settings.packing).lower(),
    }


def describe(settings: Settings, job: Job) -> str:
    """Returns settings as words: "1 picture a call, tiles of 256 px, model offload"."""
    words = [f"{settings.batch} picture{'s' if settings.batch > 1 else ''} a call"]
    words.append(f"tiles of {settings.tile} px" if settings.tile else "no tiles")
    if job.request.device == "cpu":
        words.append("packed weights" if settings.packing else "no packed weights")
    else:
        words.append(f"{settings.offload} offload" if settings.offload != NONE else "no offload")
    words += [f"{settings.quantization} weights"] if settings.quantization else []
    words += [f"{settings.text_quantization} text encoder"] if settings.text_quantization else []
    return ", ".join(words)
