"""A run that is killed at any moment, and started again, ends bitwise equal to one that never was."""

import random
import signal
import time
from dataclasses import dataclass

import pytest

from tests.training.distributed_runs import (
    Command,
    assert_same,
    await_true,
    last_step,
    launcher,
    run_options,
    state,
    torchrun,
)

STEPS = 16


@dataclass(frozen=True)
class Moment:
    """When a run is killed: some steps after its first one in the log, at a random time within a step.

    Attributes:
        steps: how many steps later.
        in_write: while the next checkpoint after that is being written.
        in_start: before the first step instead.
    """

    steps: int = 0
    in_write: bool = False
    in_start: bool = False


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, vae_folder):
    """Accumulation, averaging, a checkpoint after every step; twelve epochs of four batches, so some are half over."""
    folder = tmp_path_factory.mktemp("kill") / "pictures"
    return [*run_options(folder, text_folder, vae_folder), f"--train.extra.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """Returns what a run that is never killed leaves behind, for a number of processes."""
    ends = {}

    def end(size):
        if size not in ends:
            folder = tmp_path_factory.mktemp("whole")
            launcher().start(folder, [*options, f"--work_dir={folder / 'run'}"], world_size=size).finish()
            ends[size] = state(folder / "run")
        return ends[size]

    return end


def partial(folder):
    return next((folder / "checkpoints").glob("step_*.partial"), None)


def kill_at(run, folder, moment, generator):
    """Kills a run at a moment; whether it was still running then."""
    if moment.in_start:
        time.sleep(generator.uniform(0, 1))
    else:
        before = last_step(folder)
        await_true(lambda: last_step(folder) != before, run)  # the log is cut at the start: it may shrink
        began, first = time.monotonic(), last_step(folder)
        await_true(lambda: last_step(folder) >= first + max(moment.steps, 1), run)
        a_step = (time.monotonic() - began) / max(moment.steps, 1)
        if moment.in_write:
            stop_in_write(run, folder)
        else:
            time.sleep(generator.uniform(0, a_step))
    running = not run.ended()
    run.kill()
    return running


def stop_in_write(run, folder):
    """Halts all processes while a checkpoint is half-written, for certain."""
    while True:
        await_true(lambda: partial(folder), run)
        run.send(signal.SIGSTOP)
        if partial(folder):
            return
        run.send(signal.SIGCONT)


def survive(start, folder, moments, seed):
    """Starts a run again and again, killing it at each moment, and lets it finish at last."""
    generator = random.Random(seed)
    for moment in moments:
        with start() as run:
            assert kill_at(run, folder, moment, generator), f"the run was over before {moment}"
            if moment.in_write:
                assert partial(folder) is not None
    with start() as run:
        run.finish()


def forked(options, folder, size):
    command = [*options, f"--work_dir={folder / 'run'}"]
    return lambda: launcher().start(folder, command, world_size=size)


def test_killed_at_three_moments(options, whole, tmp_path):
    moments = [Moment(2), Moment(1, in_write=True), Moment(3)]
    survive(forked(options, tmp_path, 1), tmp_path / "run", moments, seed=1)
    assert_same(state(tmp_path / "run"), whole(1))


def test_writing_in_the_background_changes_nothing(options, whole, tmp_path):
    forked([*options, "--train.extra.async_save=true"], tmp_path, 1)().finish()
    assert_same(state(tmp_path / "run"), whole(1))


MANY = [
    Moment(1), Moment(1, in_write=True), Moment(in_start=True), Moment(2), Moment(1, in_write=True), Moment(1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "more"),
    [(1, "--train.num_workers=1"), (1, "--train.extra.async_save=true"), (2, "--train.extra.async_save=false")],
)
def test_killed_at_many_moments(options, whole, tmp_path, size, more):
    survive(forked([*options, more], tmp_path, size), tmp_path / "run", MANY, seed=size)
    assert_same(state(tmp_path / "run"), whole(size))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "launch"), [(1, ["python"]), (2, torchrun())])
def test_commands_killed_with_all_they_started(options, whole, tmp_path, size, launch):
    command = [*launch, "train_scripts/train.py", *options, f"--work_dir={tmp_path / 'run'}"]
    moments = [Moment(3), Moment(2, in_write=True)]
    survive(lambda: Command(command, tmp_path / "output.txt"), tmp_path / "run", moments, seed=size)
    assert_same(state(tmp_path / "run"), whole(size))
