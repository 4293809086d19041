"""Makes pictures of prompts.

    sana generate "a red circle on a blue background"              (the bundled model; output/inference/sana_tiny)
    sana generate "a cat" -o cat.png --seed 7 --step 30
    sana generate "a cat" "a dog --hw 512:1024" --number 4 --model_path=hf://owner/repo --work_dir=pictures --json
    sana generate --txt_file=prompts.txt --config=x.yaml --model_path=weights.pth

The paths of the pictures are printed on standard output, one a line; progress and log go to standard error. Pictures
that are already there by the very same recipe are not made again, so a stopped run goes on when it is started again.
Exit codes: 0 done, 1 failure (weights, network, disk, numbers), 2 wrong usage (options, prompt file, config),
3 nothing was loaded, because the pictures do not fit into --max_vram, 130 stopped by Ctrl-C.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana.commands.inference import add_options
from sana.commands.parsing import only_given, parse_with_overrides

OF_PROMPTS = ("negative_prompt", "height", "width", "number")
COMMAND_LINE = "the command line"  # stands for the prompt file in messages


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    parser.usage = "%(prog)s [PROMPT ...] [options] [--section.key=value ...]"
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="in quotes; may end in --ar 1:2 or --hw 512:1024 (height:width)")
    add("-o", "--output", metavar="PATH", help="a .png for one picture, else a folder, as --work_dir")
    add("--json", action="store_true", help="print one JSON document: pictures with recipes, folders, index sheets")
    group = parser.add_argument_group("of prompts on the command line").add_argument
    group("-n", "--number", type=int, help="pictures of each prompt, with seeds that follow one another (default: 1)")
    group("--negative_prompt", help="what guidance leads away from")
    group("--height", type=int, help="of the picture, in pixels (default: the model's own size)")
    group("--width", type=int, help="of the picture, in pixels (default: the model's own size)")
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Makes the pictures, prints their paths; returns the exit code."""
    parser = build_parser(prog, description)
    given, overrides = parse_with_overrides(parser, argv)
    problem = contradiction(given)
    if problem:
        parser.error(problem)

    from sana.pipelines.command import run_command

    return run_command(lambda: generate(given, overrides), debug=bool(given.get("debug")))


def contradiction(given: dict[str, Any]) -> str | None:
    """Returns what is wrong about options that belong, or do not belong, together; None where nothing is."""
    prompts = given.get("prompts", [])
    alone = [name for name in OF_PROMPTS if name in given and not prompts]
    file = next((name for name in ("txt_file", "json_file") if name in given), None)
    if alone:
        return f"--{alone[0]} belongs to prompts on the command line, and there is none"
    if prompts and file:
        return f"prompts on the command line and --{file} were both given; give one of them"
    if "number" in given and given["number"] < 1:
        return f"--number must be at least 1, not {given['number']}"
    if "output" not in given:
        return None
    if "work_dir" in given:
        return "--output and --work_dir were both given; give one of them"
    if is_picture(given["output"]):
        if len(prompts) != 1 or given.get("number", 1) != 1 or "ablation_key" in given:
            return f"--output {given['output']} is one picture: give one prompt, or a folder"
        taking = next((name for name in ("tar_and_del", "if_save_dirname") if given.get(name)), None)
        if taking:
            return f"--{taking} is about a folder, and --output names one picture"
    return None


def is_picture(output: str) -> bool:
    """Whether -o names a file."""
    return output.lower().endswith(".png")


def generate(given: dict[str, Any], overrides: Sequence[str]) -> None:
    """Makes the pictures and prints what was made."""
    with tempfile.TemporaryDirectory(prefix="sana-") as folder:
        try:
            entries = run(given, overrides, Path(folder))
        except ValueError as error:  # the prompts were written to a file, which is not the user's
            known = str(error).replace(str(Path(folder) / "prompts.json"), COMMAND_LINE)
            if known == str(error):
                raise
            raise ValueError(known) from error
    pictures = [picture for entry in entries for picture in entry["pictures"]]
    if given.get("json"):
        indexes = [entry["index"] for entry in entries if entry["index"]]
        content = {"pictures": pictures, "folders": [entry["folder"] for entry in entries], "indexes": indexes}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for path in [picture["path"] for picture in pictures] or [entry["folder"] for entry in entries]:
        print(path)


def run(given: dict[str, Any], overrides: Sequence[str], scratch: Path) -> list[dict[str, Any]]:
    """Returns one entry a run: its folder, index and pictures with their recipes.

    Args:
        given: the options.
        overrides: of the config.
        scratch: an empty folder, removed by the caller.
    """
    from sana.pipelines import batch, options
    from sana.pipelines.images import read_recipe
    from sana.utils.logging import setup_logging

    logger = setup_logging()
    mine = ("prompts", "output", "json", *OF_PROMPTS)
    settings = {name: value for name, value in given.items() if name not in mine}
    if settings.pop("version", None) is not None:
        logger.info("--version has no effect")
    if given.get("prompts"):
        settings["json_file"] = str(write_prompts(given, scratch / "prompts.json"))
    target = Path(given["output"]) if "output" in given else None
    single = target is not None and is_picture(given["output"])
    if target is not None:
        settings["work_dir"] = str(scratch / "pictures" if single else target)
    entries = []
    for report in batch.run(options.InferenceOptions(**settings, overrides=overrides)):
        if single and target is not None and (report.made or report.skipped):
            move(report.made[0], target)
            report.made[0], report.index, report.folder = target, None, target.parent
            logger.info("that picture is now %s", target)
        kept = report.folder.is_dir()  # not where the pictures were packed into a .tar
        found = [(path, False) for path in report.skipped] + [(path, True) for path in report.made]
        pictures = [
            {"path": str(path), "made": made, "recipe": read_recipe(path)} for path, made in found if kept
        ]  # fmt: skip
        index = str(report.index) if report.index else None
        entries.append({"folder": str(report.folder), "index": index, "pictures": pictures})
        logger.info("%d made, %d already there, in %s", len(report.made), len(report.skipped), report.folder)
    return entries


def write_prompts(given: dict[str, Any], path: Path) -> Path:
    """Writes the prompts of the command line to a prompt file and returns its path."""
    fields = {name: given[name] for name in ("negative_prompt", "height", "width") if name in given}
    texts = [text for text in given["prompts"] for _ in range(given.get("number", 1))]
    content = {str(place): {"prompt": text, **fields} for place, text in enumerate(texts, start=1)}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def move(picture: Path, target: Path) -> None:
    """Puts a picture where it belongs, in one step: no half of a picture is ever there under its name."""
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    shutil.copyfile(picture, partial)
    partial.replace(target)
