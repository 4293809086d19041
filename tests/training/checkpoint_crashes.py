"""Kills processes that write checkpoints and looks at what is left; run by test_checkpoints.py as a program.

Processes are forked from this one, which has imported torch already, so that a round takes milliseconds.
"""

import json
import os
import random
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sana.training.checkpoint_folder import latest_checkpoint, load_checkpoint
from sana.training.checkpoints import Checkpoints

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink")


def state(step: int, version: int) -> dict:
    return {"step": step, "version": version, "w": torch.full((300,), 1000.0 * step + version)}


def save(checkpoints: Checkpoints, step: int, version: int) -> None:
    content = state(step, version)
    checkpoints.save(
        step, shared=content, per_rank=content, export=lambda folder: (folder / "model.bin").write_bytes(bytes(100))
    )


def check(folder: Path, reported: tuple[int, int]) -> tuple[int, int]:
    """What is loaded is one of the written states, whole, and not older than the last one reported."""
    path = latest_checkpoint(folder)
    assert path is not None
    before = load_checkpoint(path)  # a reader, before the next start tidies up
    loaded = Checkpoints(folder).load()
    found = (loaded.step, loaded.shared["version"])
    assert found == (before.step, before.shared["version"])
    assert found >= reported, f"found {found}, but {reported} was complete"
    expected = state(*found)
    for content in (loaded.shared, loaded.per_rank):
        assert (content["step"], content["version"]) == found and torch.equal(content["w"], expected["w"])
    assert (loaded.path / "model.bin").stat().st_size == 100
    strangers = [path.name for path in folder.iterdir() if path.name != "latest" and not path.name[5:].isdigit()]
    assert not strangers, f"the next start left {strangers}"
    return found


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work(pipe)` in a child that ends by itself, whatever happens in it; returns (pid, reading end)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return pid, reading


def report(pipe: int, step: int, version: int) -> None:
    os.write(pipe, f"{step} {version}\n".encode())


def last_report(reading: int, default: tuple[int, int]) -> tuple[int, int]:
    with os.fdopen(reading) as file:
        lines = [line for line in file if line.endswith("\n")]
    return tuple(int(word) for word in lines[-1].split()) if lines else default


def die_at(number: int, folder: Path) -> None:
    """SIGKILL before this process's n-th operation on a file below the folder."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        inside = str(arguments[0]).startswith(str(folder)) if arguments else False
        if event in FILE_EVENTS and (inside or event in ("os.remove", "os.rmdir")):  # rmtree gives bare names
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def every_operation(root: Path, asynchronous: bool) -> int:
    """Kills one process before its first file operation, one before its second, and so on until one survives."""
    base, folder, number = root / "base", root / "run", 0
    save(Checkpoints(base), 10, 0)
    while True:
        number += 4 if asynchronous and number else 1  # the same operations: a sample of them
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)

        def work(pipe: int, number: int = number) -> None:
            die_at(number, folder)
            checkpoints = Checkpoints(folder, keep_last=1, asynchronous=asynchronous)
            for step, version in ((20, 0), (20, 1)):
                save(checkpoints, step, version)
                checkpoints.wait()
                report(pipe, step, version)

        pid, reading = forked(work)
        reported = last_report(reading, (10, 0))
        _, status = os.waitpid(pid, 0)
        check(folder, reported)
        if os.WIFEXITED(status):
            assert reported == (20, 1)
            return number


def random_moments(root: Path, rounds: int, seed: int) -> int:
    """Kills a run again and again at random moments, each time resuming what is left; returns the last step."""
    generator, folder = random.Random(seed), root / "run"
    found = (0, 0)
    save(Checkpoints(folder), *found)
    for turn in range(rounds):

        def work(pipe: int, turn: int = turn) -> None:
            checkpoints = Checkpoints(folder, keep_last=2, asynchronous=turn % 2 == 1)
            step = checkpoints.load().step
            while True:
                step += 1
                save(checkpoints, step, 0)
                if not checkpoints.asynchronous:
                    report(pipe, step, 0)

        pid, reading = forked(work)
        select.select([], [], [], generator.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = check(folder, last_report(reading, found))
    return found[0]


def main() -> None:
    """Prints {what was tried: how far it went} after everything held."""
    root = Path(sys.argv[1])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has; rounds are 20x faster
    result = {
        "operations": every_operation(root / "every", asynchronous=False),
        "operations_behind": every_operation(root / "every_async", asynchronous=True),
        "last_step": random_moments(root / "random", rounds=8, seed=5),
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
