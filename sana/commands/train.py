"""Trains a model.

    sana train CONFIG.yaml [--section.key=value ...]               (one process for each GPU, one where there is none)
    sana train CONFIG.yaml --np=2 --work_dir=output/run            (so many processes, started by torchrun)
    sana train configs/sana_config/tiny/Sana_tiny_img256.yaml --np=1 --train.extra.max_steps=100 --json

On several machines start it on each of them with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set.
The same command goes on from the newest checkpoint of its --work_dir. Also under torchrun and accelerate launch.
Exit codes: 0 done, 1 the training failed, 2 wrong arguments or configuration, 130 / 143 stopped by SIGINT / SIGTERM.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.commands.parsing import add_json, new_parser
from sana.pipelines.command import OK, USAGE, run_command
from sana.utils.distributed import is_main_process
from sana.utils.logging import setup_logging

if TYPE_CHECKING:
    from sana.training.trainer import Trainer


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the launcher; every other option belongs to the configuration."""
    parser = new_parser(prog, description or __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.yaml", help="of the run; or --config_path=FILE")
    add("--np", type=int, metavar="N", help="processes on this machine [one for each GPU, 1 without one]")
    add("--work_dir", help="folder of checkpoints, log and pictures [the config's]")
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Trains here, or starts torchrun where that takes several processes; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog, description)
    options, _ = parser.parse_known_args(words)
    if options.np is not None and options.np < 1:
        parser.error(f"--np must be at least 1, not {options.np}")
    rest = without_np(words)
    if "WORLD_SIZE" in os.environ:  # torchrun or accelerate started this process
        if options.np is not None:
            parser.error("--np starts processes, and a launcher has started this one: leave it out")
        return train(rest)
    several_machines = int(os.environ.get("NNODES", "1")) > 1
    processes = options.np or (gpus() if config_path(rest) else 1)  # counting GPUs takes a second
    if processes == 1 and not several_machines:
        return train(rest)
    os.execve(sys.executable, torchrun_command(processes, rest), os.environ | threads())  # signals reach torchrun


def without_np(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line without --np=N and --np N."""
    kept = []
    skip = False
    for word in words:
        if not skip and word != "--np" and not word.startswith("--np="):
            kept.append(word)
        skip = word == "--np"
    return kept


def gpus() -> int:
    """Returns the number of CUDA devices, 1 where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def threads() -> dict[str, str]:
    """Returns the number of threads of each of several processes: what the user said, else 1."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def torchrun_command(processes: int, arguments: Sequence[str]) -> list[str]:
    """Returns the command that starts processes of this machine, on one machine or as one of several.

    Raises:
        SystemExit: NNODES says several machines, and NODE_RANK or MASTER_ADDR is not set.
    """
    where = ["--standalone"]
    nodes = os.environ.get("NNODES", "1")
    if nodes != "1":
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not os.environ.get(name)]
        if missing:
            sys.stderr.write(f"error: NNODES is {nodes}, and {' and '.join(missing)} must be set on every machine\n")
            raise SystemExit(USAGE)
        where = [
            f"--nnodes={nodes}", f"--node_rank={os.environ['NODE_RANK']}",
            f"--master_addr={os.environ['MASTER_ADDR']}", f"--master_port={os.environ.get('MASTER_PORT', '29500')}",
        ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc_per_node={processes}"]
    return [*launcher, "-m", "sana.cli", "train", *arguments]


def config_path(arguments: Sequence[str]) -> str | None:
    """Returns the YAML file that the arguments name, None where they name none."""
    path = next((a for a in arguments if not a.startswith("--")), None)
    return path or next((a.split("=", 1)[1] for a in arguments if a.startswith("--config_path=")), None)


def train(arguments: Sequence[str], description: str | None = None) -> int:
    """Trains in this process; returns the exit code. Every failure that a user can mend is one sentence."""
    path = config_path(arguments)
    if path is None or {"--help", "-h"} & set(arguments):
        print(description or __doc__, file=sys.stderr)
        return OK if {"--help", "-h"} & set(arguments) else USAGE

    overrides = [a for a in arguments if a.startswith("--") and a != "--json" and not a.startswith("--config_path=")]

    def work() -> int:
        from sana.config import load_config

        setup_logging()
        config = load_config(path, overrides)
        from sana.training.trainer import StoppedBySignal, Trainer  # takes seconds: a typo is told before

        trainer, code, reason = Trainer(config), OK, None
        try:
            trainer.train()
        except StoppedBySignal as stop:
            code, reason = stop.exit_code, signal.Signals(stop.exit_code - 128).name
            if is_main_process():
                print(stop, file=sys.stderr)
        if "--json" in arguments and is_main_process():
            print(json.dumps(result(trainer, reason), indent=2, ensure_ascii=False))
        return code

    return run_command(work)


def result(trainer: "Trainer", signal_name: str | None = None) -> dict[str, Any]:
    """Returns what a training that ended leaves behind, for --json.

    Args:
        trainer: after `train`.
        signal_name: of the signal that stopped it, None where none did.
    """
    from sana.training.train_log import LOG_NAME

    done = trainer.step >= trainer.total_steps
    log = Path(trainer.work_dir) / LOG_NAME
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    loss = json.loads(lines[-1])["loss"] if lines else None
    return {
        "work_dir": str(trainer.work_dir),
        "steps": trainer.step,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "model": str(trainer.work_dir / "model") if done and signal_name is None else None,
        "reason": signal_name or ("done" if done else "early_stop_hours"),
    }
