"""Loads a server as its users will, and as its enemies will: throughput, latency, hostile requests, memory.

    python -m tools.bench.serve                                # the bundled model, about six minutes on two cores
    python -m tools.bench.serve --quick                        # a minute, to see whether it runs
    python -m tools.bench.serve --output=asset/docs/benchmarks

A server of its own is started (`sana serve`, watched). Clients ask for one picture after another, each as soon as it
has the last; so again with --max_active=1. Then come the hostile requests, 16 at a time. Writes serving-DEVICE.json
and serving-DEVICE.md; the report comes last on stdout. Exit codes: 0 done, 1 the server failed a request that it should
have answered, made another picture, told too much in an error, ended, or grew; 2 wrong arguments.
"""

import argparse
import asyncio
import base64
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from tools.bench.attack import attack
from tools.bench.hostile import SECRET, Target, exchange, posted
from tools.bench.serving_load import load
from tools.bench.serving_memory import Watched
from tools.bench.serving_report import markdown

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60
ALONE = (1, 8, 64)  # numbers of clients that are asked again with --max_active=1
QUICK = {"clients": [1, 2], "seconds": 1.0, "steps": 2, "size": "64x64", "hostile": 150}
VERSIONS = ("uvicorn", "fastapi", "h11", "uvloop")


def numbers(text: str) -> list[int]:
    """Reads "1,2,4"."""
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 1,4,16, not {text!r}") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--clients", type=numbers, default=[1, 2, 4, 8, 16, 32, 64], help="[1,2,4,8,16,32,64]")
    add("--seconds", type=float, default=12.0, help="of asking, for each number of clients [12]")
    add("--steps", type=int, default=20, help="of every picture [20]")
    add("--size", default="auto", help="of every picture [auto: the model's own]")
    add("--hostile", type=int, default=10_000, help="number of hostile requests [10000]")
    add("--seed", type=int, default=0, help="of the hostile requests [0]")
    add("--model_path", help="[the bundled model]")
    add("--device", default="cpu", help="[cpu]")
    add("--quick", action="store_true", help="few clients, small pictures, few hostile requests")
    add("--output", type=Path, default=ROOT / "output/benchmarks", metavar="DIR", help="[output/benchmarks]")
    return parser


@contextmanager
def server(options: argparse.Namespace, *more: str) -> Iterator[tuple[Target, Watched, str]]:
    """Runs a server; gives where it listens, its process, and its model's name. It must end with exit code 0."""
    command = [sys.executable, "-m", "tools.bench.watched_server", "--json", "--port=0", f"--device={options.device}",
               "--max_queue=128", "--header_seconds=2", "--body_seconds=2", "--grace_seconds=5", *more]  # fmt: skip
    command += [f"--model_path={options.model_path}"] if options.model_path else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            ready = process.stdout.readline().strip()
            if not ready:
                raise RuntimeError(f"the server did not start: {shlex.join(command)}")
            about = json.loads(ready)
            host, _, port = about["url"].removeprefix("http://").rpartition(":")
            yield Target(host, int(port)), Watched(process), about["model"]
            process.terminate()
            code = process.wait(PATIENCE_SECONDS)
            if code:
                raise RuntimeError(f"the server ended with exit code {code}")
        finally:
            process.kill()


async def picture(target: Target, wish: dict[str, Any]) -> bytes:
    """Returns the pixels of a good request's picture; empty when there is none."""
    status, answer = await exchange(target, posted(json.dumps(wish).encode()))
    if status != 200:
        return b""
    with Image.open(BytesIO(base64.b64decode(json.loads(answer)["data"][0]["b64_json"]))) as opened:
        return opened.convert("RGB").tobytes()


def offline(options: argparse.Namespace, wish: dict[str, Any]) -> bytes:
    """Returns the pixels of the same picture made by the pipeline in this process."""
    from sana.pipelines.batch import name_pipeline
    from sana.pipelines.options import InferenceOptions

    pipeline, weights = name_pipeline(InferenceOptions(model_path=options.model_path, device=options.device))
    size = None if wish["size"] == "auto" else [int(side) for side in wish["size"].split("x")]
    sides = {"width": size[0], "height": size[1]} if size else {}
    made = pipeline.from_pretrained(weights)(
        wish["prompt"], num_inference_steps=wish["steps"], seed=wish["seed"], output_type="pil", **sides
    )
    pixels: bytes = made[0].convert("RGB").tobytes()
    return pixels


async def measure_load(
    target: Target, options: argparse.Namespace, clients: Sequence[int], wish: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    """Returns one entry a number of clients."""
    await load(target, 2, 1.0, wish)  # warm
    found = []
    with tqdm(clients, desc=name, unit="load", dynamic_ncols=True) as bar:
        for count in bar:
            bar.set_postfix_str(f"{count} clients")
            found.append(await load(target, count, options.seconds, wish))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything."""
    wish = {"prompt": f"a red circle left of a blue square, {SECRET}", "steps": options.steps, "size": options.size}
    known = wish | {"seed": 7}
    alone = [one for one in options.clients if one in ALONE] or options.clients[-1:]
    with server(options, "--max_active=1") as (target, _, _):
        one_at_a_time = asyncio.run(measure_load(target, options, alone, wish, "one at a time"))
    with server(options) as (target, watched, model):
        found = asyncio.run(measure_load(target, options, options.clients, wish, "together"))
        before = asyncio.run(picture(target, known))
        with tqdm(total=options.hostile, desc="hostile", unit="request", dynamic_ncols=True) as bar:
            hostile = asyncio.run(attack(target, watched, options.hostile, options.seed, bar.update))
        after = asyncio.run(picture(target, known))
    hostile["same_picture"] = bool(before) and before == after == offline(options, known)
    return {"model": model, "wish": wish, "load": found, "one_at_a_time": one_at_a_time, "hostile": hostile}


def complaints(content: dict[str, Any]) -> list[str]:
    """Returns what speaks against the server: nothing if it answered every good request and bore every hostile one."""
    hostile = content["hostile"]
    found = [f"{one['clients']} clients: answers {one['failures']} instead of pictures"
             for one in [*content["load"], *content["one_at_a_time"]] if one["failures"]]  # fmt: skip
    found += [f"{number} errors: {text}" for text, number in hostile["wrong_errors"].items()]
    found += [f"{hostile['server_errors']} server errors"] if hostile["server_errors"] else []
    found += [f"{hostile['hanging']} requests without an answer"] if hostile["hanging"] else []
    found += [] if hostile["healthy_after"] else ["the server is not healthy after the hostile requests"]
    found += [] if hostile["same_picture"] else ["a picture after the hostile requests is not the offline one"]
    return found + hostile["memory"]["reasons"] * (hostile["memory"]["flat"] is False)


def write(content: dict[str, Any], folder: Path) -> None:
    """Writes the JSON and the Markdown, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"serving-{content['environment']['slug']}"
    for ending, text in ((".json", json.dumps(content, indent=1) + "\n"), (".md", markdown(content))):
        temporary = stem.with_name(f".{stem.name}{ending}.part")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, stem.with_name(stem.name + ending))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.quick:
        options = parser.parse_args(arguments, argparse.Namespace(**QUICK))
    if options.hostile < 50 or not options.seconds > 0:
        parser.error("--hostile must be at least 50 and --seconds positive")
    from tools.bench.environment import collect, load, version

    environment, started = collect("cpu" if options.device == "cpu" else "cuda", arguments), time.monotonic()
    environment["command"] = shlex.join(["python", "-m", "tools.bench.serve", *arguments])
    environment["versions"] |= {name: version(name) for name in VERSIONS}
    content = {"environment": environment, **measure(options)}
    environment["load_after"], content["seconds"] = load(), time.monotonic() - started
    content["complaints"] = complaints(content)
    content["passed"] = not content["complaints"]
    write(content, options.output)
    print(markdown(content))
    return 0 if content["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
