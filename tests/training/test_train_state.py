"""A training state round-trips, a failed save leaves the old one, and only what can be read back safely is stored."""

import collections
import enum
import errno

import numpy as np
import pytest
import torch

from sana.training import train_state


def test_round_trip_and_absence(tmp_path):
    path = tmp_path / "run" / "state.pt"
    assert train_state.load_train_state(path) is None
    train_state.save_train_state(path, {"step": 3, "model": {"w": torch.arange(4.0)}})
    loaded = train_state.load_train_state(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], torch.arange(4.0))
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("room", [0, 100, 5000, 100_000])
def test_a_full_disk_is_an_oserror_and_keeps_the_old_state(tmp_path, monkeypatch, room):
    path = tmp_path / "state.pt"
    train_state.save_train_state(path, {"step": 1})
    left = [room]

    class Full(train_state._WatchedFile):
        def write(self, data):
            left[0] -= len(data)
            if left[0] < 0:
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            return super().write(data)

    monkeypatch.setattr(train_state, "_WatchedFile", Full)
    with pytest.raises(OSError, match="No space left"):
        train_state.save_train_state(path, {"step": 2, "w": torch.zeros(100_000)})
    monkeypatch.undo()
    assert train_state.load_train_state(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_real_error_of_the_file_is_not_hidden_by_torch(tmp_path):
    class Refusing:
        def write(self, data):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        def flush(self):
            pass

    watched = train_state._WatchedFile(Refusing())
    with pytest.raises((OSError, RuntimeError)):
        torch.save({"w": torch.zeros(9)}, watched)
    assert watched.error.errno == errno.EDQUOT


def test_files_and_names_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(train_state.os, name)
        monkeypatch.setattr(train_state.os, name, lambda *a, name=name, real=real: (events.append(name), real(*a))[1])
    train_state.save_train_state(tmp_path / "state.pt", {"step": 1})
    assert events == ["fsync", "replace", "fsync"]


def test_plain_values_read_back_safely(tmp_path):
    value = {
        "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(list, {3: [1, 2]}),
        "numpy": [np.float64(0.1), np.int64(7), np.bool_(True)], "tuple": (1, None, "x", b"y", 2.5),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), "dtype": torch.float16,
        "size": torch.Size((2, 3)), "set": {1, 2}, "device": torch.device("cpu"), ("a", 1): True,
    }  # fmt: skip
    train_state.write_tensors(tmp_path / "x.pt", train_state.plain(value))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded.pop("parameter"), torch.ones(2, dtype=torch.bfloat16))
    assert loaded == {
        "ordered": {"a": 1}, "default": {3: [1, 2]}, "numpy": [0.1, 7, True], "tuple": (1, None, "x", b"y", 2.5),
        "dtype": torch.float16, "size": torch.Size((2, 3)), "set": {1, 2}, "device": torch.device("cpu"),
        ("a", 1): True,
    }  # fmt: skip
    assert [type(x) for x in loaded["numpy"]] == [float, int, bool]


@pytest.mark.parametrize(
    "bad", [object(), np.zeros(2), enum.IntEnum("Colour", "RED").RED, collections.deque([1]), lambda: 0]
)
def test_anything_else_is_refused_with_its_place(bad):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is of type"):
        train_state.plain({"a": [0, bad]})


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    view = torch.arange(100_000.0)[5:8]
    train_state.write_tensors(tmp_path / "x.pt", train_state.plain({"v": view}))
    assert (tmp_path / "x.pt").stat().st_size < 5000
    assert torch.load(tmp_path / "x.pt", weights_only=True)["v"].tolist() == [5.0, 6.0, 7.0]


@pytest.mark.parametrize("copy", [False, True])
def test_a_snapshot_shares_no_memory(copy):
    tensor = torch.zeros(3)
    taken = train_state.plain([tensor], copy=copy)[0]
    tensor += 1
    assert taken.tolist() == ([0.0] * 3 if copy else [1.0] * 3)
