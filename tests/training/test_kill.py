"""A run that is killed at any moment, and started again, ends bitwise equal to one that never was."""

import functools
import random
import signal
from dataclasses import dataclass

import pytest

from tests.training.distributed_runs import Command, await_true, launcher, run_options, torchrun
from tests.training.run_results import assert_same, last_step, state

STEPS = 16
PATIENT_STEPS = 60  # of runs that are watched from outside, for a watcher that may come late


@dataclass(frozen=True)
class Moment:
    """When a run is killed: some steps after it went on, at a random time within a step.

    Attributes:
        steps: how many steps later.
        in_write: while the next checkpoint after that is being written.
        in_start: before the first step instead.
    """

    steps: int = 0
    in_write: bool = False
    in_start: bool = False

    def death(self, generator):
        """How a process kills itself at this moment."""
        if self.in_start:
            return {"steps": 0, "part": -generator.uniform(0.001, 0.5)}
        return {
            "steps": self.steps,
            "part": generator.random(),
            "syncs": generator.randint(1, 3) if self.in_write else None,
        }


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, vae_folder):
    """Accumulation, averaging, a checkpoint after every step; twelve epochs of four batches, so some are half over."""
    folder = tmp_path_factory.mktemp("kill") / "pictures"
    return run_options(folder, text_folder, vae_folder)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """Returns what a run that is never killed leaves behind, for a number of processes."""

    @functools.cache
    def end(size, steps=STEPS):
        folder = tmp_path_factory.mktemp("whole")
        launcher().start(folder, command(options, folder, steps), world_size=size).finish()
        return state(folder / "run")

    return end


def partial(folder):
    return next((folder / "checkpoints").glob("step_*.partial"), None)


def command(options, folder, steps=STEPS):
    return [*options, f"--work_dir={folder / 'run'}", f"--train.extra.max_steps={steps}"]


def survive(options, folder, moments, size, seed):
    """Starts a run again and again, which is killed at each moment, and lets it finish at last."""
    generator = random.Random(seed)
    for moment in moments:
        run = launcher().start(folder, command(options, folder), world_size=size, death=moment.death(generator))
        await_true(run.ended, run, await_ending=True)
        run.kill()
        assert -signal.SIGKILL in run.wait(), f"the run was over before {moment}\n{run.text}"
        assert not moment.in_write or partial(folder / "run")
    launcher().start(folder, command(options, folder), world_size=size).finish()


def kill_from_outside(run, folder, steps, in_write):
    """Kills a command with all it started some steps after it went on, perhaps while a checkpoint is half-written."""
    before = last_step(folder)
    await_true(lambda: last_step(folder) != before, run)  # the log is cut at the start: it may shrink
    first = last_step(folder)
    await_true(lambda: last_step(folder) >= first + steps, run)
    while in_write:
        await_true(lambda: partial(folder), run)
        run.send(signal.SIGSTOP)
        if partial(folder):
            break
        run.send(signal.SIGCONT)
    assert not run.ended()
    run.kill()
    assert not in_write or partial(folder)


def test_killed_at_three_moments(options, whole, tmp_path):
    moments = [Moment(2), Moment(1, in_write=True), Moment(3)]
    survive(options, tmp_path, moments, size=1, seed=1)
    assert_same(state(tmp_path / "run"), whole(1))


def test_writing_in_the_background_changes_nothing(options, whole, tmp_path):
    launcher().start(tmp_path, command([*options, "--train.extra.async_save=true"], tmp_path)).finish()
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
    survive([*options, more], tmp_path, MANY, size, seed=size)
    assert_same(state(tmp_path / "run"), whole(size))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "launch"), [(1, ["python"]), (2, torchrun())])
def test_commands_killed_with_all_they_started(options, whole, tmp_path, size, launch):
    arguments = [*launch, "train_scripts/train.py", *command(options, tmp_path, PATIENT_STEPS)]
    for steps, in_write in ((3, False), (2, True)):
        with Command(arguments, tmp_path / "output.txt") as run:
            kill_from_outside(run, tmp_path / "run", steps, in_write)
    with Command(arguments, tmp_path / "output.txt") as run:
        run.finish()
    assert_same(state(tmp_path / "run"), whole(size, PATIENT_STEPS))
