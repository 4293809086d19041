"""The command `sana`: finds a command and hands over to `sana/commands`. No command's work, and no parser, is here."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sana import __version__
from sana.registry import suggest

OK, USAGE, INTERRUPTED = 0, 2, 130


@dataclass(frozen=True)
class Command:
    """A command: the module with its `build_parser()` and `main()`, one line of help, and an example of its use."""

    module: str
    help: str
    example: str


COMMANDS = {
    "generate": Command("sana.commands.generate", "make pictures of prompts", 'sana generate "a red circle" -o a.png'),
    "replay": Command("sana.commands.replay", "make a picture again from its own recipe", "sana replay a.png"),
    "serve": Command(
        "sana.commands.serve", "serve pictures over HTTP, as OpenAI's interface", "sana serve --port=8000"
    ),
    "app": Command("app.app_sana", "make pictures in a browser", "sana app --port=15432"),
    "serve-ray": Command(
        "sana.commands.serve_ray", "the same with replicas on many machines", "sana serve-ray --max_replicas=4"
    ),
    "train": Command("sana.commands.train", "train a model", "sana train CONFIG.yaml --np=2 --work_dir=output/run"),
    "plan": Command("sana.commands.plan", "say what pictures or a training run need in memory", "sana plan --json"),
    "cache": Command(
        "sana.commands.cache", "compute latents and text features of a data set", "sana cache CONFIG.yaml --only=text"
    ),
    "data check": Command(
        "sana.commands.data_check", "list what would spoil training", "sana data check asset/example_data"
    ),
    "convert to-diffusers": Command(
        "sana.commands.to_diffusers",
        "write a checkpoint in diffusers' layout",
        "sana convert to-diffusers --orig_ckpt_path=asset/models/sana_tiny --save_full_pipeline --dump_path=FOLDER",
    ),
    "convert from-diffusers": Command(
        "sana.commands.from_diffusers",
        "write a checkpoint from a folder of diffusers",
        "sana convert from-diffusers --diffusers_path=FOLDER --dump_path=weights.safetensors",
    ),
    "quantize": Command(
        "sana.commands.quantize",
        "make a model folder with quantised weights",
        "sana quantize --model_path=asset/models/sana_tiny --scheme=int8 --output=FOLDER",
    ),
    "doctor": Command("sana.commands.doctor", "say what is installed, used and missing, and why", "sana doctor --json"),
    "completion": Command(
        "sana.commands.completion", "print a script that completes commands in a shell", "sana completion bash"
    ),
}
EXIT_CODES = """exit codes:
  0    done, and everything is well
  1    the work could not be done, or what was examined is not in order (weights, network, disk, data, an installation)
  2    wrong usage: a command, an option, a prompt file or a configuration
  3    nothing fits into --max_vram; nothing was loaded
  130  stopped by Ctrl-C (the same command goes on);  143  a training stopped by SIGTERM"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `sana ARGUMENTS`; returns the exit code.

    Args:
        argv: the arguments; those of the process when None.

    Raises:
        SystemExit: argparse ends wrong usage (2) and --help (0) so.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(words)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def dispatch(words: Sequence[str]) -> int:
    """Finds the command that the first words name and runs it with the others."""
    name = find(words)
    if name is not None:
        return run(name, words[len(name.split()) :])
    first = words[0] if words else ""
    group = first if first in groups() else ""
    rest = list(words[1:] if group else words)
    if rest and rest[0] in ("--help", "-h"):
        print(overview(group))
        return OK
    if rest and rest[0] == "--version":
        print(__version__)
        return OK
    if not rest:
        sys.stderr.write(f"{overview(group)}\n")
        return USAGE
    known = [one.removeprefix(group).strip() for one in COMMANDS if one.startswith(group)]
    known = list(dict.fromkeys(one.split()[0] for one in known)) if not group else known
    where = f"sana {group}".strip()
    hint = suggest(rest[0], known)
    sys.stderr.write(f"error: {where} has no command {rest[0]!r}.{hint} See {where} --help.\n")
    return USAGE


def find(words: Sequence[str]) -> str | None:
    """Returns the name of the command at the start of some words, None where there is none."""
    return next((name for name in COMMANDS if list(words[: len(name.split())]) == name.split()), None)


def groups() -> set[str]:
    """Returns the first words of commands of two words."""
    return {name.split()[0] for name in COMMANDS if " " in name}


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs a command; returns its exit code."""
    more: dict[str, Any] = {}
    if name == "completion":
        more["parsers"] = {one: parser_of(one) for one in COMMANDS}
        more["helps"] = {one: command.help for one, command in COMMANDS.items()}
    return int(import_module(COMMANDS[name].module).main(list(arguments), prog=f"sana {name}", **more))


def parser_of(name: str) -> Any:
    """Returns the argparse parser of a command."""
    return import_module(COMMANDS[name].module).build_parser(f"sana {name}")


def overview(group: str = "") -> str:
    """Returns the help of `sana`, or of a command of two words by its first one."""
    shown = {name: command for name, command in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(len(name) for name in shown)
    lines = [f"usage: sana {group or 'COMMAND'} {'COMMAND ' if group else ''}[--help] [options]", ""]
    if not group:
        lines += ["Pictures from words, with linear diffusion transformers.", ""]
    lines += ["commands:", *(f"  {name:<{width}}  {command.help}" for name, command in shown.items())]
    lines += ["", "examples:", *(f"  {command.example}" for command in shown.values())]
    if not group:
        lines += [
            "",
            "Results go to standard output, progress and log to standard error; --json makes data of results.",
        ]
        lines += ["sana COMMAND --help shows a command's options; sana --version the version.", "", EXIT_CODES]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
