"""Crops hold objects; folder images come in a fixed endless order that any split and any resumption keeps."""

import logging
import random

import pytest
import torch
from PIL import Image

from sana.data.sample import BrokenSampleError, DataError, Sample
from sana.training import dcae_data
from sana.training.dcae_data import FolderImages, ImageFiles, SceneImages, crops, first_images


class Numbers:
    """Record i is an image full of i; those in `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.unreadable = count, broken

    def __len__(self):
        return self.count

    def key(self, index):
        return str(index)

    def load(self, index, rng):
        if index in self.unreadable:
            raise BrokenSampleError(str(index), "torn")
        return Sample(str(index), "", image=torch.full((3, 2, 2), float(index)))

    def fingerprint(self):
        return str(self.count)


def drawn(images, steps):
    return [images.batch(step, 0.0)[:, 0, 0, 0].int().tolist() for step in range(steps)]


def test_crops_are_in_range_and_each_holds_part_of_an_object():
    batch = crops(5, 16, whole=False)
    assert batch.shape == (16, 3, 128, 128)
    assert batch.min() >= -1 and batch.max() <= 1
    assert all(image.flatten(1).std(1).max() > 0.01 for image in batch)
    assert crops(5, 2, whole=True).shape == (2, 3, 256, 256)
    assert torch.equal(batch, crops(5, 16, whole=False))


def test_scenes_are_a_function_of_step_and_rank():
    first, second = (SceneImages(4, 0, whole_scene_from=0.5, rank=rank, world_size=2) for rank in (0, 1))
    assert torch.equal(first.batch(3, 0.0), first.batch(3, 0.0))
    assert not torch.equal(first.batch(3, 0.0), second.batch(3, 0.0))
    assert first.batch(3, 0.0).shape == (4, 3, 128, 128) and first.batch(3, 0.6).shape == (2, 3, 256, 256)


def test_every_epoch_shows_every_image_once_in_a_new_order():
    seen = [index for batch in drawn(FolderImages(Numbers(7), 3, seed=1), 14) for index in batch]
    epochs = [seen[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert seen != [index for batch in drawn(FolderImages(Numbers(7), 3, seed=2), 14) for index in batch]


def test_processes_divide_the_steps_of_one_process():
    together = drawn(FolderImages(Numbers(7), 4, seed=1), 5)
    halves = [drawn(FolderImages(Numbers(7), 2, seed=1, rank=rank, world_size=2), 5) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves)] == together


def test_a_resumed_order_goes_on_also_with_reading_processes():
    unbroken = drawn(FolderImages(Numbers(7), 2, seed=1), 6)
    images = FolderImages(Numbers(7), 2, seed=1, start=6, workers=2)
    assert drawn(images, 3) == unbroken[3:]
    images.close()


def test_an_unreadable_image_is_named_once_and_the_next_one_takes_its_place(caplog):
    whole = [index for batch in drawn(FolderImages(Numbers(5), 1, seed=1), 11) for index in batch]
    dataset = Numbers(5, broken=(whole[1],))
    with caplog.at_level(logging.ERROR, logger="sana"):
        images = FolderImages(dataset, 1, seed=1)
        seen = [index for batch in drawn(images, 10) for index in batch]
    assert seen == [whole[i + 1] if index == whole[1] else index for i, index in enumerate(whole[:10])]
    assert images.broken == {str(whole[1])}
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(whole[1])]


def test_too_many_unreadable_images_stop_the_run(monkeypatch):
    with pytest.raises(DataError, match="in a row"):
        FolderImages(Numbers(4, broken=range(4)), 1, seed=0).batch(0, 0.0)
    monkeypatch.setattr(dcae_data, "MAX_BROKEN", 2)
    images = FolderImages(Numbers(9, broken=(1, 4, 7)), 9, seed=3)
    with pytest.raises(DataError, match="more than 2|in a row"):
        images.batch(0, 0.0)
    with pytest.raises(DataError, match="no image"):
        FolderImages(Numbers(0), 1, seed=0)


def test_image_files_of_nested_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, size, colour in (("b.PNG", (40, 30), "red"), ("deep/a.jpeg", (20, 60), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "broken.webp").write_bytes(b"x")
    files = ImageFiles([tmp_path], 32)
    assert [files.key(index) for index in range(len(files))] == ["b.PNG", "broken.webp", "deep/a.jpeg"]
    image = files.load(0, random.Random(0)).image
    assert image.shape == (3, 32, 32) and image[:, 16, 16].tolist() == [1, -1, -1]
    with pytest.raises(BrokenSampleError, match=r"broken\.webp"):
        files.load(1, random.Random(0))
    assert first_images(files, 8).shape == (2, 3, 32, 32)
    assert files.fingerprint() != ImageFiles([tmp_path / "deep"], 32).fingerprint()


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        ImageFiles([tmp_path / "nowhere"], 32)
    with pytest.raises(DataError, match="holds no image"):
        ImageFiles([tmp_path], 32)
