"""SIGTERM and SIGINT: the state is saved, the exit code tells, and the same command goes on exactly."""

import os
import signal

import pytest

from sana.training.checkpoint_folder import latest_checkpoint
from sana.training.signals import REPEAT_SECONDS, SignalWatch, StoppedBySignal
from tests.training.distributed_runs import Command, alive, await_true, descendants, launcher, run_options, torchrun
from tests.training.run_results import assert_same, last_step, state


@pytest.fixture
def clock():
    """Seconds, as a list that a test sets."""
    return [100.0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_noted(signum, code):
    before = signal.getsignal(signum)
    with SignalWatch() as watch:
        assert watch.received == 0
        signal.raise_signal(signum)
        assert watch.received == signum
    assert signal.getsignal(signum) is before
    assert StoppedBySignal(signum).exit_code == code
    assert signal.Signals(signum).name in str(StoppedBySignal(signum))


def test_a_repeated_signal_is_that_of_the_launcher_and_a_later_one_interrupts(clock):
    # pytest may have been started in the background of a shell, which ignores SIGINT there
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with SignalWatch(clock=lambda: clock[0]) as watch:
        signal.raise_signal(signal.SIGINT)
        clock[0] += REPEAT_SECONDS / 2
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert watch.received == signal.SIGINT
        clock[0] += REPEAT_SECONDS
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_later_signal_of_another_kind_acts_too(clock):
    def end(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        with SignalWatch(clock=lambda: clock[0]):
            signal.raise_signal(signal.SIGINT)
            clock[0] += 2 * REPEAT_SECONDS
            with pytest.raises(InterruptedError):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("launched", "asked"), [(True, signal.SIGTERM), (False, 0)])
def test_without_its_launcher_a_run_stops(launched, asked, monkeypatch):
    with SignalWatch(launched=launched) as watch:
        assert watch.asked == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watch.asked == asked


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, vae_folder):
    """Checkpoints are written at the end and at signals only."""
    folder = tmp_path_factory.mktemp("signals") / "pictures"
    more = ["--train.save_model_steps=1000", "--train.save_model_epochs=1000", "--train.extra.max_steps=60"]
    return [*run_options(folder, text_folder, vae_folder), *more]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """What undisturbed runs leave behind, by number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {
        size: launcher().start(folder, [*options, f"--work_dir={folder / str(size)}"], world_size=size)
        for size in (1, 2)
    }
    for run in runs.values():
        run.finish()
    return {size: state(folder / str(size)) for size in runs}


def assert_stopped_in_the_middle(folder, text):
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and 3 <= int(checkpoint.name.removeprefix("step_")) < 60
    assert not (folder / "model").exists()
    assert "the same command goes on" in text and "Traceback" not in text


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_stopped_run_goes_on_exactly(options, whole, tmp_path, signum, code, size):
    """Of two processes, only the second gets the signal: both stop after the same step."""
    command, folder = [*options, f"--work_dir={tmp_path / 'run'}"], tmp_path / "run"
    run = launcher().start(tmp_path, command, world_size=size, signal=[size - 1, 3, signum])
    assert run.wait() == [code] * size
    assert_stopped_in_the_middle(folder, run.text)
    launcher().start(tmp_path, command, world_size=size).finish()
    assert_same(state(folder), whole[size])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [False, True])
def test_torchrun_stops_politely_too(options, whole, tmp_path, signum, to_all):
    """To torchrun alone, or as from a scheduler to all processes at once: then each gets the signal twice."""
    folder = tmp_path / "run"
    command = torchrun("train_scripts/train.py", *options, f"--work_dir={folder}")
    with Command(command, tmp_path / "output.txt") as run:
        await_true(lambda: last_step(folder) >= 3, run)
        trainings = descendants(run.process.pid) if to_all else []
        for pid in (*trainings, run.process.pid):
            os.kill(pid, signum)
        assert run.wait() == 1
        assert "the same command goes on" in run.text
    assert latest_checkpoint(folder / "checkpoints") is not None and not (folder / "model").exists()
    with Command(command, tmp_path / "again.txt") as run:
        run.finish()
    assert_same(state(folder), whole[2])


@pytest.mark.slow
def test_processes_of_a_killed_torchrun_do_not_train_on(options, tmp_path):
    folder = tmp_path / "run"
    command = torchrun("train_scripts/train.py", *options, f"--work_dir={folder}", "--train.extra.max_steps=1000000")
    with Command(command, tmp_path / "output.txt") as run:
        await_true(lambda: last_step(folder) >= 3, run)
        trainings = descendants(run.process.pid)
        assert len(trainings) == 2
        run.process.kill()
        run.wait()
        try:
            await_true(lambda: not any(map(alive, trainings)), run, await_ending=True)
        finally:
            for pid in filter(alive, trainings):
                os.kill(pid, signal.SIGKILL)
    assert latest_checkpoint(folder / "checkpoints") is not None
