"""Images for autoencoder training: drawn scenes or folders, each batch a function of its position alone.

Nothing here has a state but the number of images seen, which is what makes a resumed run exact.
"""

import hashlib
import math
import random
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sana.data.images import EXTENSIONS, read_image
from sana.data.sample import BrokenSampleError, DataError, Dataset, Sample
from sana.data.scenes import CELL, GRID, draw_scene, scenes
from sana.data.transforms import get_transform, normalise_images
from sana.utils.logging import get_logger

logger = get_logger(__name__)

CROP_CELLS = 4  # side of a training crop, in lattice cells
MAX_BROKEN = 100  # different unreadable images before a run gives up


def crops(seed: int, batch_size: int, *, whole: bool) -> Tensor:
    """A batch of whole scenes, or of lattice-aligned crops that each contain an object; (B, 3, S, S) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    stream, batch = scenes(seed), []
    for scene in (next(stream) for _ in range(batch_size)):
        image = draw_scene(scene)
        if not whole:
            item = scene.objects[int(rng.integers(len(scene.objects)))]
            corner = []
            for start in (item.row, item.column):
                low, high = max(0, start + item.cells - CROP_CELLS), min(start, GRID - CROP_CELLS)
                corner.append(CELL * int(rng.integers(min(low, high), max(low, high) + 1)))
            image = image[corner[0] : corner[0] + CELL * CROP_CELLS, corner[1] : corner[1] + CELL * CROP_CELLS]
        batch.append(torch.from_numpy(image))
    return torch.stack(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


class SceneImages:
    """Drawn scenes without end: crops of 128 pixels first, whole scenes (a quarter as many) in the last part of a run.

    Args:
        batch_size: crops of this process in a step.
        seed: of the run.
        whole_scene_from: part of the run after which scenes are whole.
        rank: of this process; each draws its own.
        world_size: number of processes.
    """

    def __init__(
        self, batch_size: int, seed: int, *, whole_scene_from: float, rank: int = 0, world_size: int = 1
    ) -> None:
        self.batch_size, self.seed, self.whole_scene_from = batch_size, seed, whole_scene_from
        self.rank, self.world_size = rank, world_size
        self.name, self.broken = "drawn scenes", set[str]()

    def batch(self, step: int, fraction: float) -> Tensor:
        """Images of a step of the run, which is `fraction` of the way; (B, 3, S, S) in [-1, 1]."""
        whole = fraction >= self.whole_scene_from
        count = max(2, self.batch_size // 4) if whole else self.batch_size
        return crops(self.seed + (step * self.world_size + self.rank) * 1000 + 17, count, whole=whole)

    def close(self) -> None:
        """Does nothing: there are no reading processes."""


class ImageFiles:
    """Every image file below folders, captions or not, as a `Dataset` of squares: an autoencoder needs no caption.

    Args:
        folders: searched in their order; hidden files are left out.
        image_size: the shorter side is scaled to it and the middle cut out, in pixels.

    Raises:
        DataError: a folder is missing, or holds no image.
    """

    def __init__(self, folders: Sequence[str | Path], image_size: int) -> None:
        self.image_size, self.transform, self.files = (
            image_size,
            get_transform("default_train"),
            list[tuple[str, Path]](),
        )
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise DataError(f"{folder} is no folder")
            found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS]
            found = [path for path in found if path.is_file() and not path.name.startswith(".")]
            if not found:
                raise DataError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
            self.files += [(path.relative_to(folder).as_posix(), path) for path in found]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index][0]

    def buckets(self) -> list[str]:
        return ["1.0"] * len(self)

    def load(self, index: int, rng: random.Random) -> Sample:
        key, path = self.files[index]
        try:
            return Sample(key, "", image=normalise_images(self.transform(read_image(path, key), self.image_size)))
        except ValueError as error:  # a strip that would become enormous
            raise BrokenSampleError(key, str(error)) from error

    def fingerprint(self) -> str:
        keys = "\n".join(key for key, _ in self.files)
        return hashlib.sha256(keys.encode("utf-8", "surrogateescape")).hexdigest()


class FolderImages:
    """Images of a data set in an endless order: every epoch is a permutation of its own, and no image is left over.

    Position p of the run is image `permutation(epoch)[p % N]` of epoch `p // N`; a step takes the next
    `batch_size * world_size` positions, which the processes divide in the order of their ranks. An unreadable image is
    logged with its key, and the next readable one of the order takes its place: the same one in every run.

    Args:
        dataset: records with `image`, all of one size.
        batch_size: images of this process in a step.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        start: images that all processes together have seen before (resume).
        workers: processes that read ahead; 0 reads in this one.
        broken: keys of images found unreadable before (resume).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        broken: Sequence[str] = (),
    ) -> None:
        if not len(dataset):
            raise DataError("the data set holds no image")
        self.dataset, self.seed, self.broken = dataset, seed, set(broken)
        self.name = dataset.fingerprint()
        self._batches = _PositionBatches(start + rank * batch_size, batch_size, world_size)
        self._loader = DataLoader(
            _Positions(dataset, seed), batch_sampler=self._batches, num_workers=workers, collate_fn=_collate,
            worker_init_fn=_leave_signals_to_training,
        )  # fmt: skip
        self._iterator: Iterator[tuple[Tensor, list[tuple[str, str]]]] | None = None

    def batch(self, step: int, fraction: float) -> Tensor:
        """The next images, (B, 3, H, W) in [-1, 1].

        Raises:
            DataError: too many images cannot be read.
        """
        if self._iterator is None:
            self._iterator = iter(self._loader)
        images, broken = next(self._iterator)
        for key, reason in broken:
            if key not in self.broken:
                logger.error("%s: %s; the next image takes its place", key, reason)
                self.broken.add(key)
        if len(self.broken) > MAX_BROKEN:
            raise DataError(f"more than {MAX_BROKEN} images cannot be read, the last of them {broken[-1][0]}")
        return images

    def close(self) -> None:
        """Ends the reading processes; `batch` would start them anew."""
        self._iterator = None


class _Positions:
    """position -> (image, [(key, reason) of unreadable images before it]); also in worker processes."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, position: int) -> tuple[Tensor, list[tuple[str, str]]]:
        broken: list[tuple[str, str]] = []
        for further in range(min(len(self.dataset), MAX_BROKEN + 1)):
            epoch, place = divmod(position + further, len(self.dataset))
            index = int(permutation(len(self.dataset), self.seed, epoch)[place])
            try:
                sample = self.dataset.load(index, random.Random(f"{self.seed}/{epoch}/{index}"))
            except BrokenSampleError as error:
                broken.append((error.key, error.reason))
                continue
            assert sample.image is not None
            return normalise_images(sample.image), broken
        raise DataError(f"{len(broken)} images in a row cannot be read, the last of them {broken[-1][0]}")


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a function of these three numbers, equal on every process."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))


class _PositionBatches:
    """Lists of positions without end, one list a batch."""

    def __init__(self, first: int, batch_size: int, world_size: int) -> None:
        self.first, self.batch_size, self.world_size = first, batch_size, world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.world_size


def _collate(samples: list[tuple[Tensor, list[tuple[str, str]]]]) -> tuple[Tensor, list[tuple[str, str]]]:
    return torch.stack([image for image, _ in samples]), [pair for _, broken in samples for pair in broken]


def _leave_signals_to_training(_: int) -> None:
    """Ctrl-C and many schedulers reach all processes: the training process decides when its readers end.

    A second SIGTERM ends one: the training process sends it where a reader hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))


def first_images(dataset: Dataset, count: int) -> Tensor:
    """`count` readable images spread evenly over a data set, in its order; (count, 3, H, W). All where it has fewer."""
    step = max(1, math.ceil(len(dataset) / count))
    images = []
    for index in range(0, len(dataset), step):
        try:
            image = dataset.load(index, random.Random(index)).image
            assert image is not None
            images.append(normalise_images(image))
        except BrokenSampleError as error:
            logger.error("%s: %s", error.key, error.reason)
    if not images:
        raise DataError("no image of the data set can be read")
    return torch.stack(images)
