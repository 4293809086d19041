"""Two runs never write into one folder, whoever starts them; one that is killed leaves nothing in the way."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import save_autoencoder
from sana.training import run_lock
from sana.training.run_lock import LOCK_NAME, RunLock, WorkDirInUseError
from sana.training.trainer import Trainer
from tests.training.conftest import SHAPE
from tests.training.distributed_runs import ROOT, Command, await_true, environment, launcher, run_options
from tests.training.run_results import last_step
from train_scripts import train_dcae

HOLDER = """
import os, sys
from sana.training.run_lock import RunLock
lock = RunLock(sys.argv[1], main=True, gather=lambda value: [value])
lock.acquire()
if "child" in sys.argv and os.fork() == 0:  # as the processes that read images
    print("child", os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def alone(work_dir: Path) -> RunLock:
    return RunLock(work_dir, main=True, gather=lambda value: [value])


def holder(work_dir: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(work_dir), *words],
        cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size and time of the last change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(WorkDirInUseError) as refused:
            alone(tmp_path / "run").acquire()
        assert f"work_dir {tmp_path / 'run'} is in use: process {process.pid} on " in str(refused.value)
        assert "stop that one or wait for its end, or choose another work_dir" in str(refused.value)
        process.stdin.close()  # it ends by itself
        process.wait()
    lock = alone(tmp_path / "run")
    lock.acquire()
    lock.release()


def test_a_killed_process_is_not_in_the_way_though_its_children_live(tmp_path: Path) -> None:
    process = holder(tmp_path, "child")
    lines = {process.stdout.readline().split()[0], process.stdout.readline().split()[0]}
    assert lines == {"child", "held"}
    process.kill()
    process.wait()
    lock = alone(tmp_path)
    lock.acquire()  # its child waits for a word on its standard input still
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    lock.release()
    process.stdin.close()
    assert process.stdout.read() == ""  # the child ended now, not before
    process.stdout.close()


def test_one_process_may_hold_it_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = alone(tmp_path), alone(tmp_path / "." / "sub" / "..")
    (tmp_path / "sub").mkdir()
    first.acquire()
    first.acquire()
    second.acquire()
    first.release()
    first.release()
    with holder(tmp_path) as process:
        assert process.stdout.readline() == ""  # refused: the second holds it
        assert process.wait() == 1
    del second
    with holder(tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        process.stdin.close()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds is counted anew: trainers of other tests may still hold their folders."""
    monkeypatch.setattr(run_lock, "_HELD", {})


@pytest.mark.usefixtures("no_locks")
def test_all_processes_of_a_run_fail_together_and_only_the_main_one_locks(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.stdout.readline()
        refused: list[object] = []

        def gather(value: object) -> list[object]:
            refused.append(value)
            return [value, None]

        with pytest.raises(WorkDirInUseError):
            RunLock(tmp_path, main=True, gather=gather).acquire()
        with pytest.raises(WorkDirInUseError):
            RunLock(tmp_path, main=False, gather=lambda value: [refused[0], value]).acquire()
        process.stdin.close()
    other = RunLock(tmp_path, main=False, gather=lambda value: [None, value])
    other.acquire()
    assert not run_lock._HELD


def test_file_systems_without_locks_and_runs_of_other_machines_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("sana"), "propagate", True)
    (tmp_path / LOCK_NAME).write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "yesterday"}))
    alone(tmp_path).acquire()
    assert "the last run into" in caplog.text and "process 7 on elsewhere" in caplog.text
    caplog.clear()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    alone(tmp_path).acquire()
    assert "keeps no locks (No locks available): do not start two trainings" in caplog.text


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, vae_folder: Path) -> list[str]:
    return run_options(tmp_path_factory.mktemp("lock") / "pictures", text_folder, vae_folder)


@pytest.mark.parametrize("size", [1, 2])
def test_two_trainings_into_one_folder(options: list[str], tmp_path: Path, size: int) -> None:
    work_dir = tmp_path / "run"
    command = [*options, f"--work_dir={work_dir}", "--train.extra.max_steps=100000"]
    with launcher().start(tmp_path, command, world_size=size) as first:
        await_true(lambda: last_step(work_dir) >= 2, first)
        first.send(signal.SIGSTOP)
        before = contents(work_dir)
        with launcher().start(tmp_path, command, world_size=size) as second:
            assert second.wait() == [1] * size
        assert f"work_dir {work_dir} is in use: process {first.pids[0]} on " in second.text
        assert "Traceback" not in second.text
        assert contents(work_dir) == before
        first.send(signal.SIGCONT)
        reached = last_step(work_dir)
        await_true(lambda: last_step(work_dir) > reached, first)  # the first one goes on
    reached = last_step(work_dir)
    assert reached > 2  # it was killed, and is resumed at once
    again = [*options, f"--work_dir={work_dir}", f"--train.extra.max_steps={reached + 2}"]
    launcher().start(tmp_path, again, world_size=size).finish()
    assert last_step(work_dir) == reached + 2


@pytest.mark.usefixtures("no_locks")
def test_a_trainer_that_has_trained_or_cannot_be_built_gives_its_folder_back(tiny_config, monkeypatch) -> None:
    trainer = Trainer(tiny_config)
    assert run_lock._HELD
    trainer.train()
    assert not run_lock._HELD
    monkeypatch.setattr(Trainer, "_check_agreement", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failed:
        Trainer(tiny_config)
    assert not run_lock._HELD and failed  # although the half-built trainer is still in the traceback


def test_two_trainings_of_an_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), tmp_path / "start")
    work_dir = tmp_path / "run"
    arguments = ["--work_dir", str(work_dir), "--vae_pretrained", str(tmp_path / "start"), "--batch_size", "1"]
    arguments += ["--mixed_precision", "fp32", "--log_every", "1", "--save_every", "1", "--steps"]
    script = [sys.executable, "train_scripts/train_dcae.py", *arguments]
    with Command([*script, "100000"], tmp_path / "output.txt") as first:
        await_true(lambda: last_step(work_dir) >= 2, first)
        first.send(signal.SIGSTOP)
        before = contents(work_dir)
        assert train_dcae.main([*arguments, "100000"]) == 1
        error = capsys.readouterr().err
        assert f"error: work_dir {work_dir} is in use: process {first.process.pid} on " in error
        assert contents(work_dir) == before
    lock = alone(work_dir)
    lock.acquire()  # killed: free at once
    lock.release()
