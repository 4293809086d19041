"""Trainings in processes of their own, which tests watch, signal, kill and compare.

`launcher()` is a server that has imported what trainings import and forks each of them from itself: a start takes a
fraction of a second, and is otherwise that of `python train_scripts/train.py`, with what torchrun would announce.
As a program under torchrun, with a job as its only argument, this file runs one job.
"""

import atexit
import functools
import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY_YAML = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
PICTURES = 16
PATIENCE = 240.0  # seconds for anything that takes one or two on a quiet machine; only a hang takes this long


def run_options(folder: Path, text_folder: Path, vae_folder: Path) -> list[str]:
    """Draws pictures into a folder; returns a command line that trains on them in a second: 2 x 2 a step, with EMA."""
    folder.mkdir()
    for number in range(PICTURES):
        colour = (15 * number, 255 - 15 * number, 60)
        Image.new("RGB", (64, 64), colour).save(folder / f"picture_{number:02}.png")
        (folder / f"picture_{number:02}.txt").write_text(f"a red cat number {number}")
    return [
        TINY_YAML, f"--data.data_dir=[{folder}]", "--data.type=SanaImgDataset", "--model.image_size=64",
        f"--vae.vae_pretrained={vae_folder}", "--vae.vae_latent_dim=4",
        f"--text_encoder.text_encoder_name={text_folder}", "--text_encoder.caption_channels=16",
        "--model.extra={depth: 1, hidden_size: 32, num_heads: 2}", "--model.mixed_precision=fp32",
        "--model.class_dropout_prob=0.3", "--train.extra.train_text_encoder=false",
        "--train.extra.null_caption_probability=0", "--train.optimizer={type: AdamW, lr: 1.0e-3}",
        "--train.lr_schedule=constant", "--train.lr_schedule_args={num_warmup_steps: 0}", "--train.ema_rate=0.9",
        "--train.train_batch_size=2", "--train.gradient_accumulation_steps=2", "--train.log_interval=1",
        "--train.save_model_steps=1", "--train.extra.max_steps=4",
    ]  # fmt: skip


@dataclass
class Run:
    """Processes of one training.

    Attributes:
        pids: in the order of ranks.
        output: what they wrote to both streams, one file a rank.
    """

    server: "Launcher"
    pids: list[int]
    output: list[Path]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self) -> list[int]:
        """Exit codes, in the order of ranks; minus the signal where one ended a process. A hang is killed and fails."""
        codes = [self.server.ask({"wait": pid, "seconds": PATIENCE})["code"] for pid in self.pids]
        if None in codes:
            self.kill()
            raise AssertionError(f"{codes}: a process hangs\n{self.text}")
        return codes

    def finish(self) -> None:
        """Waits, and demands success."""
        codes = self.wait()
        assert not any(codes), f"{codes}\n{self.text}"

    def ended(self) -> bool:
        return any(self.server.ask({"wait": pid, "seconds": 0})["code"] is not None for pid in self.pids)

    def send(self, signum: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            pid = self.pids[rank]
            if self.server.ask({"wait": pid, "seconds": 0})["code"] is None:  # else its number may be another's by now
                os.kill(pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for pid in self.pids:
            self.server.ask({"wait": pid, "seconds": PATIENCE})

    @property
    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.output)


class Launcher:
    """Starts trainings by forking from a process that has imported all they need."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment(), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.started = 0
        atexit.register(self.close)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, *commands: list[str], world_size: int = 1, **behaviour: Any) -> Run:
        """Starts processes that run the command lines one after another; see `run_job` for what else they can do."""
        self.started += 1
        output = [folder / f"output_{self.started}_{rank}.txt" for rank in range(world_size)]
        job = {"commands": commands, **behaviour}
        request = {"job": job, "world_size": world_size, "output": [str(path) for path in output]}
        return Run(self, self.ask(request)["pids"], output)


@functools.cache
def launcher() -> Launcher:
    """The one of this test process."""
    return Launcher()


@dataclass
class Command:
    """A training by its real command, in a process group of its own.

    Attributes:
        arguments: of the command.
        output: file for both streams.
    """

    arguments: list[str]
    output: Path
    process: subprocess.Popen = field(init=False)

    def __enter__(self) -> "Command":
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                self.arguments, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def finish(self) -> None:
        code = self.wait()
        assert code == 0, f"{code}\n{self.text}"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def send(self, signum: int) -> None:
        """Signals the command and all it started: torchrun gives its processes groups of their own."""
        family = [self.process.pid, *descendants(self.process.pid)] if not self.ended() else []
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGSTOP)  # or one of them could start another meanwhile
        self.send(signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text()


def descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment() -> dict[str, str]:
    """That of this process, with this Python first, one thread, no network, and no GPU: there may be one for two."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fixed = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", *arguments]


def await_true(condition: Callable[[], Any], run: Run | Command, *, await_ending: bool = False) -> Any:
    """Waits until a condition of a training holds; fails if that ends before, but for an ending that is awaited.

    Returns:
        The condition's value.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert not run.ended() or await_ending or condition(), f"the run ended before\n{run.text}"
        assert time.monotonic() < deadline, f"nothing happened\n{run.text}"
        time.sleep(0.001)
    return value


@dataclass
class Death:
    """When a process kills itself: counted from within, so that no watcher can come too late.

    Attributes:
        steps: after so many steps of this process.
        part: and this part of the time of a step. If negative: before the first step, minus so many seconds after
            the start.
        syncs: if given, then as it brings the so many-th file to the disk, in the midst of writing a checkpoint.
    """

    steps: int
    part: float
    syncs: int | None = None
    taken: int = 0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.part < 0:
            threading.Timer(-self.part, self._die).start()

    def before_step(self) -> None:
        """Counts steps; lets none be taken by a process that is to die before the first."""
        if self.part < 0:
            threading.Event().wait()
        if self.taken == 1:
            self.began = time.monotonic()  # the first step is a slow one
        if self.taken == self.steps and self.syncs is not None:
            os.fsync = self._sync  # type: ignore[assignment]
        elif self.taken == self.steps:
            a_step = (time.monotonic() - self.began) / max(self.taken - 1, 1)
            threading.Timer(self.part * a_step, self._die).start()
        self.taken += 1

    def _sync(self, descriptor: int) -> None:
        self.syncs -= 1
        if self.syncs <= 0:
            self._die()

    @staticmethod
    def _die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def run_job(job: dict[str, Any]) -> int:
    """Runs the command lines of a job in this process.

    Args:
        job: "commands"; "keys": a file name, to which rank and epoch are added, that gets the keys of every
            micro-batch; "rank_options": rank -> further options; "fail": [rank, step] raises there;
            "poison": [rank, step] makes the last picture there a NaN; "signal": [rank, step, number] is sent there;
            "death": see `Death`.

    Returns:
        The exit code of the last command that ran: one that fails is the last.
    """
    from sana.data.transforms import normalise_images
    from sana.training import trainer as module

    rank = int(os.environ.get("RANK", "0"))
    death = Death(**job["death"]) if "death" in job else None

    class Watched(module.Trainer):
        def train_step(self, batches: list[Any]) -> None:
            if death:
                death.before_step()
            if job.get("signal", [])[:2] == [rank, self.step]:
                signal.raise_signal(job["signal"][2])
            if "keys" in job:
                with open(f"{job['keys']}_{rank}.jsonl", "a") as file:
                    file.writelines(json.dumps([batch.epoch, batch.keys]) + "\n" for batch in batches)
            if job.get("fail") == [rank, self.step]:
                raise RuntimeError("this process was told to fail")
            if job.get("poison") == [rank, self.step]:
                images = normalise_images(batches[-1].images)
                images[-1] = math.nan
                batches[-1] = replace(batches[-1], images=images)
            super().train_step(batches)

    original, module.Trainer = module.Trainer, Watched
    main = runpy.run_path(str(ROOT / "train_scripts/train.py"))["main"]
    try:
        for command in job["commands"]:
            code = main([*command, *job.get("rank_options", {}).get(str(rank), [])])
            if code:
                return code
    finally:
        module.Trainer = original
    return 0


def _serve() -> None:
    import sana.training.trainer  # noqa: F401  so that forked processes need not
    from sana.pipelines import command

    command.PATIENCE_SECONDS = 0.0  # there is no torchrun that would end a process meanwhile
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a killed process loses nothing that the kernel has
    with tempfile.TemporaryFile("a+") as new_modules:  # names, one a line, written by forked processes that end well
        for line in sys.stdin:
            request = json.loads(line)
            answer = {"code": _wait(**request)} if "wait" in request else {"pids": _fork(new_modules, **request)}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def _wait(wait: int, seconds: float, codes: dict[int, int] = {}) -> int | None:  # noqa: B006  kept between calls
    deadline = time.monotonic() + seconds
    while wait not in codes:
        pid, status = os.waitpid(wait, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return None
        else:
            time.sleep(0.005)
    return codes[wait]


def _learn(new_modules: TextIO) -> None:
    """Imports what earlier trainings had to import themselves."""
    new_modules.seek(0)
    for name in dict.fromkeys(new_modules.read().split()):
        with suppress(ImportError):  # made at run time
            importlib.import_module(name)
    new_modules.truncate(0)


def _fork(new_modules: TextIO, job: dict[str, Any], world_size: int, output: list[str]) -> list[int]:
    _learn(new_modules)
    known, pids = set(sys.modules), []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            nothing = os.open(os.devnull, os.O_RDONLY)
            file = os.open(output[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            for source, target in ((nothing, 0), (file, 1), (file, 2)):
                os.dup2(source, target)
            if world_size > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                os.environ |= {key: str(value) for key, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = run_job(job)
            if not code and not rank:
                new_modules.write("".join(f"{name}\n" for name in set(sys.modules) - known))
            raise SystemExit(code)  # up through the server's frames, to the end of the interpreter
        pids.append(pid)
    return pids


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(run_job(json.loads(sys.argv[1])))
    _serve()
