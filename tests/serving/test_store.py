"""The store of pictures: bounds, expiry, names."""

from pathlib import Path

import pytest

from sana.serving.store import PictureStore


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def files_of(store):
    return list(Path(store._folder.name).iterdir())


def test_pictures_come_back_until_their_time_is_up(clock):
    with PictureStore(10, 1000, 60, clock) as store:
        name = store.put(b"png")
        clock.now = 59.9
        assert store.get(name) == b"png"
        clock.now = 60.0
        assert store.get(name) is None
        assert files_of(store) == []


@pytest.mark.parametrize(("max_files", "max_bytes"), [(3, 10**6), (100, 30)])
def test_the_oldest_go_when_there_are_too_many_or_too_large_ones(clock, max_files, max_bytes):
    with PictureStore(max_files, max_bytes, 60, clock) as store:
        names = [store.put(bytes(10)) for _ in range(5)]
        assert [store.get(name) is not None for name in names] == [False, False, True, True, True]
        assert len(store) == len(files_of(store)) == 3


def test_one_that_is_larger_than_the_store_is_not_kept(clock):
    with PictureStore(3, 5, 60, clock) as store:
        assert store.get(store.put(bytes(10))) is None


def test_names_are_not_paths_and_differ(clock):
    with PictureStore(10, 1000, 60, clock) as store:
        names = {store.put(b"png") for _ in range(10)}
        assert len(names) == 10 and all(len(name) == 36 for name in names)
        folder = Path(store._folder.name)
        for name in ("../../etc/passwd", str(folder), "", ".", f"../{folder.name}/{names.pop()}"):
            assert store.get(name) is None
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
