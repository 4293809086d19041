"""Checkpoints are whole or absent: rounds of saving, killing, filling the disk, damaging, with one rank and several."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.models.checkpoint import CheckpointError
from sana.training import checkpoints, train_state
from sana.training.checkpoint_folder import latest_checkpoint
from sana.training.checkpoints import Checkpoints, CheckpointWriteError, check_writable
from tests.training.checkpoint_tools import ROOT, names, program, three_checkpoints, value


@pytest.fixture
def saved(tmp_path):
    return three_checkpoints(tmp_path / "checkpoints")


def test_round_trip_and_what_lies_there(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.latest() is None

    def export(folder):
        save_file({"x": torch.ones(3)}, folder / "model.safetensors")
        (folder / "more").mkdir()
        (folder / "more" / "config.json").write_text("{}")

    store.save(400, shared={"optimizer": {"state": {0: {"m": torch.arange(3)}}}}, per_rank={"p": [1]}, export=export)
    assert names(store.folder) == ["latest", "step_00000400"]
    assert (store.folder / "latest").read_text() == "step_00000400\n"
    path = store.latest()
    assert names(path) == ["checkpoint.json", "model.safetensors", "more", "rank_00000.pt", "shared.pt"]
    index = json.loads((path / "checkpoint.json").read_text())
    assert (index["step"], index["world_size"], index["torch"]) == (400, 1, torch.__version__)
    assert set(index["files"]) == {"model.safetensors", "more/config.json", "rank_00000.pt", "shared.pt"}
    for name, entry in index["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    loaded = store.load()
    assert (loaded.step, loaded.world_size, loaded.path) == (400, 1, path)
    assert loaded.shared["optimizer"]["state"][0]["m"].tolist() == [0, 1, 2]
    assert loaded.per_rank == {"p": [1]} and loaded.all_ranks == [{"p": [1]}]
    assert load_file(path / "model.safetensors")["x"].tolist() == [1, 1, 1]


def test_a_relative_folder(tmp_path, monkeypatch):
    """As in `--work_dir=output/run`."""
    monkeypatch.chdir(tmp_path)
    store = Checkpoints("run/checkpoints")
    store.save(3, shared={"value": value(3)}, export=lambda folder: (folder / "inner").mkdir())
    store.save(4)
    assert [latest_checkpoint(tmp_path / "run/checkpoints").name, store.folder.is_absolute()] == [
        "step_00000004",
        False,
    ]


def test_an_empty_checkpoint_and_the_same_step_again(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1)
    assert (store.load().shared, store.load().per_rank) == ({}, {})
    store.save(1, shared={"again": True}, export=lambda folder: (folder / "extra").write_text("x"))
    store.save(1, shared={"again": 2})
    assert store.load().shared == {"again": 2}
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert names(tmp_path / "step_00000001") == ["checkpoint.json", "rank_00000.pt", "shared.pt"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [7]), (3, 0, [5, 6, 7]), (1, 3, [0, 3, 6, 7]), (2, 4, [0, 4, 6, 7]), (9, 0, [*range(8)])],
)
def test_keep_rules(tmp_path, keep_last, keep_every, left):
    store = Checkpoints(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in range(8):
        store.save(step)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in left)]


def test_pruning_never_takes_what_was_just_written_or_what_a_rolled_back_run_has_yet_to_reach(saved):
    (saved.folder / "latest").write_text("step_00000100")
    store = Checkpoints(saved.folder, keep_last=1)
    assert store.load().step == 100
    store.save(150, shared=value(150))
    assert names(saved.folder) == ["latest", "step_00000150", "step_00000200", "step_00000300"]
    assert store.load().step == 150
    store.save(300, shared=value(300))
    assert names(saved.folder) == ["latest", "step_00000300"]


@pytest.mark.parametrize("arguments", [{"keep_last": 0}, {"keep_every": -1}, {"rank": 2, "world_size": 2}])
def test_impossible_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be"):
        Checkpoints(tmp_path, **arguments)
    with pytest.raises(ValueError, match="must not be negative"):
        Checkpoints(tmp_path).save(-1)


def test_the_next_start_removes_leftovers_and_only_those(saved, caplog):
    shutil.copytree(saved.folder / "step_00000300", saved.folder / "step_00000400.partial")
    shutil.copytree(saved.folder / "step_00000100", saved.folder / "step_00000050.trash")
    (saved.folder / "latest.partial").write_text("step_00000400")
    (saved.folder / "notes.txt").write_text("mine")
    (saved.folder / "step_by_step").mkdir()
    before = names(saved.folder)
    assert latest_checkpoint(saved.folder).name == "step_00000300"
    Checkpoints(saved.folder, rank=1, world_size=2)
    assert names(saved.folder) == before  # rank 0 only
    Checkpoints(saved.folder)
    whole = [f"step_{step:08d}" for step in (100, 200, 300)]
    assert names(saved.folder) == ["latest", "notes.txt", *whole, "step_by_step"]


@pytest.mark.parametrize("final", ["absent", "damaged", "whole"])
def test_a_replacement_cut_between_its_renames_is_finished(saved, final):
    new, old = saved.folder / "step_00000300", saved.folder / "step_00000300.replaced"
    shutil.copytree(new, old)
    (old / "old").touch()
    if final == "absent":
        shutil.rmtree(new)
    elif final == "damaged":
        os.truncate(new / "shared.pt", 200)
    assert latest_checkpoint(saved.folder) == (new if final == "whole" else old)
    assert Checkpoints(saved.folder).load().path == new
    assert (new / "old").exists() == (final != "whole") and not old.exists()


def save_all(stores, step, **arguments):
    """Saves on every rank, each in a thread; returns what they raised."""
    raised = [None] * len(stores)

    def one(rank):
        try:
            stores[rank].save(step, shared=value(step), per_rank={"rank": rank}, **arguments)
            stores[rank].wait()
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(len(stores)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("asynchronous", [False, True])
def test_three_ranks_and_another_world_size(tmp_path, asynchronous):
    stores = [Checkpoints(tmp_path, rank=r, world_size=3, timeout_s=60, asynchronous=asynchronous) for r in range(3)]
    for step in (1, 2, 2):
        assert save_all(stores, step) == [None] * 3
    path = tmp_path / "step_00000002"
    assert names(path) == ["checkpoint.json", *(f"rank_{r:05d}.pt" for r in range(3)), "shared.pt"]
    assert [store.load().per_rank for store in stores] == [{"rank": r} for r in range(3)]
    alone = Checkpoints(tmp_path).load()
    assert (alone.per_rank, alone.world_size, alone.step) == (None, 3, 2)
    assert alone.all_ranks == [{"rank": r} for r in range(3)]
    assert torch.equal(alone.shared["w"], value(2)["w"])
    (path / "rank_00000.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000\.pt is missing"):
        _ = Checkpoints(tmp_path).load(path).all_ranks


def test_without_the_other_rank_nothing_becomes_whole(tmp_path):
    store = Checkpoints(tmp_path, world_size=2, timeout_s=0.05)
    with pytest.raises(CheckpointWriteError, match=r"nothing from rank 1 within 0\.05 s"):
        store.save(5)
    assert names(tmp_path) == []


def test_marks_of_a_failed_attempt_do_not_count(tmp_path):
    first = Checkpoints(tmp_path, world_size=2, timeout_s=0.05)
    second = Checkpoints(tmp_path, rank=1, world_size=2)
    with pytest.raises(CheckpointWriteError):
        first.save(5)
    second.save(5, per_rank={"attempt": 1})  # comes too late: its mark stays in the folder
    with pytest.raises(CheckpointWriteError):
        first.save(5)
    first.timeout_s = 60
    second.save(5, per_rank={"attempt": 2})
    assert save_all([first, second], 5) == [None, None]
    assert Checkpoints(tmp_path).load().all_ranks == [{"rank": 0}, {"rank": 1}]


def test_a_failure_of_another_rank_is_heard_at_once(tmp_path, monkeypatch):
    stores = [Checkpoints(tmp_path, rank=r, world_size=2, timeout_s=250) for r in range(2)]
    real = checkpoints.write_tensors

    def full_on_rank_1(path, content):
        if path.name == "rank_00001.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_tensors", full_on_rank_1)
    first, second = save_all(stores, 5)
    assert "rank 1 failed" in str(first) and "No space left" in str(first) and "make room" in str(first)
    assert "No space left" in str(second)
    assert names(tmp_path) == []


def test_the_state_is_that_of_the_call(tmp_path, monkeypatch):
    store, go = Checkpoints(tmp_path, asynchronous=True), threading.Event()
    real = checkpoints.write_tensors
    monkeypatch.setattr(checkpoints, "write_tensors", lambda *a: (go.wait(60), real(*a)))
    weights, history = torch.ones(4), [1]
    kept = train_state.plain({"w": weights}, copy=True)

    def export(folder):
        return lambda: save_file(kept, folder / "model.safetensors")

    store.save(1, shared={"w": weights, "h": history}, per_rank={"w": weights}, export=export)
    weights.zero_(), history.append(2)
    assert latest_checkpoint(tmp_path) is None
    go.set()
    store.wait()
    loaded = store.load()
    assert loaded.shared["w"].tolist() == loaded.per_rank["w"].tolist() == [1, 1, 1, 1]
    assert loaded.shared["h"] == [1]
    assert load_file(loaded.path / "model.safetensors")["w"].tolist() == [1, 1, 1, 1]


def test_one_write_at_a_time_in_order(tmp_path, monkeypatch):
    store, running, most = Checkpoints(tmp_path, asynchronous=True, keep_last=9), [], []
    real = Checkpoints._write

    def counting(self, step, *rest):
        running.append(step)
        most.append(len(running))
        real(self, step, *rest)
        running.remove(step)

    monkeypatch.setattr(Checkpoints, "_write", counting)
    for step in range(5):
        store.save(step, shared=value(step))
    store.wait()
    assert most == [1] * 5 and len(names(tmp_path)) == 6 and store.load().step == 4


@pytest.mark.parametrize("how", ["wait", "save"])
def test_a_failure_behind_surfaces_once_at_the_next_call(saved, monkeypatch, caplog, how):
    store = Checkpoints(saved.folder, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "bad sector")))
        store.save(400, shared=value(400))
        with pytest.raises(CheckpointWriteError, match="step_00000400 could not be written .bad sector"):
            store.wait() if how == "wait" else store.save(500)
    assert "bad sector" in caplog.text
    assert store.load().step == 300
    store.save(500, shared=value(500))
    store.wait()
    assert store.load().step == 500


def test_the_interpreter_waits_at_exit(tmp_path):
    code = (
        "import sys, torch\n"
        "from concurrent.futures import thread\n"
        "from sana.training import checkpoints\n"
        "real = checkpoints.write_tensors\n"
        "def late(*arguments):\n"
        "    while not thread._shutdown:  # set when the program has ended\n"
        "        pass\n"
        "    real(*arguments)\n"
        "checkpoints.write_tensors = late\n"
        "checkpoints.Checkpoints(sys.argv[1], asynchronous=True).save(3, shared={'w': torch.ones(9)})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, timeout=200)
    assert Checkpoints(tmp_path).load().shared["w"].sum() == 9


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: the kernel's own error, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = torch.zeros(30_000)
WRITERS = {
    "shared": {"shared": {"w": BIG}},
    "per_rank": {"per_rank": {"w": BIG}},
    "sharded": {"sharded": {"w": BIG}},
    "export": {"export": lambda folder: save_file({"w": BIG}, folder / "model.safetensors")},
    "export_later": {"export": lambda folder: lambda: save_file({"w": BIG}, folder / "model.safetensors")},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_refused_write_leaves_what_was_there(saved, small_files, writer, asynchronous):
    before = {path: path.read_bytes() for path in saved.folder.rglob("*") if path.is_file()}
    store = Checkpoints(saved.folder, keep_last=1, asynchronous=asynchronous)
    with pytest.raises(CheckpointWriteError) as caught:
        store.save(400, **WRITERS[writer])
        store.wait()
    message = str(caught.value)
    assert f"{saved.folder}/step_00000400 could not be written" in message and "\n" not in message
    assert message.endswith("earlier checkpoints are untouched: make room on that disk and start again.")
    assert {path: path.read_bytes() for path in saved.folder.rglob("*") if path.is_file()} == before
    assert names(saved.folder) == ["latest", *(f"step_{step:08d}" for step in (100, 200, 300))]


def test_an_error_at_any_call_to_the_kernel_leaves_a_whole_checkpoint(saved, monkeypatch):
    calls = {"n": 0, "fail": 0}

    def failing(real):
        def call(*arguments, **options):
            calls["n"] += 1
            if calls["n"] == calls["fail"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call

    template = saved.folder.with_name("template")
    shutil.copytree(saved.folder, template)
    failures = 0
    for fail in range(1, 60):
        shutil.rmtree(saved.folder)
        shutil.copytree(template, saved.folder)
        store = Checkpoints(saved.folder, keep_last=1)
        calls.update(n=0, fail=fail)
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                store.save(300, shared={"note": "new", "w": torch.zeros(10)})
            except CheckpointWriteError as error:
                assert "No space left on device" in str(error)
                failures += 1
        loaded = store.load()
        assert loaded.step == 300 and loaded.shared["note"] in ("step 300", "new")
        assert not list(saved.folder.glob("*.partial/*"))
        if calls["n"] < fail:
            break
    assert failures >= 10 and loaded.shared["note"] == "new"
    assert names(saved.folder) == ["latest", "step_00000300"]


@pytest.mark.parametrize("bad", [{"shared": {"f": print}}, {"per_rank": {"o": object()}}, {"sharded": {"o": object()}}])
def test_what_cannot_be_read_back_is_refused_before_anything_is_written(saved, bad):
    with pytest.raises(TypeError, match="cannot be stored safely"):
        saved.save(400, **bad)
    assert len(names(saved.folder)) == 4 and saved.load().step == 300


def test_an_error_of_the_caller_passes_through(saved):
    with pytest.raises(ZeroDivisionError):
        saved.save(400, export=lambda folder: 1 / 0)
    assert len(names(saved.folder)) == 4 and saved.load().step == 300


def test_check_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointWriteError, match="remove the file that is in its place, or choose another"):
            check_writable(folder)
    for code, advice in ((errno.EROFS, "change its permissions"), (errno.ENOSPC, "make room on that disk")):
        error = OSError(code, os.strerror(code))
        monkeypatch.setattr(checkpoints.os, "fsync", lambda fd, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(CheckpointWriteError, match=f"{os.strerror(code)}.*{advice}"):
            check_writable(tmp_path / "a")
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointWriteError, match="Permission denied.: change its permissions"):
        check_writable(tmp_path)


def test_killed_at_every_file_operation_and_at_random_moments(tmp_path):
    done = program("checkpoint_crashes", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["operations"] > 40 and result["operations_behind"] > 40 and result["last_step"] > 0
