"""Serves pictures over HTTP, in the form of OpenAI's image interface. Needs: pip install 'sana-python[serve]'

sana serve                                        (the bundled model, http://127.0.0.1:8000)
sana serve --model_path=hf://owner/repo --host=0.0.0.0 --api_key_file=keys.txt

curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'

The address is printed when the server is ready. SIGTERM and Ctrl-C end it: what is in work is finished, what waits is
handed back with 503. Exit codes: 0 ended as asked, 1 failure (weights, network, address in use), 2 wrong usage,
3 nothing was loaded, because the pictures do not fit into --max_vram.
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from sana.commands.parsing import SCHEMES, only_given, parse_with_overrides, tiles

MODEL = (
    "config", "model_path", "device", "dtype", "max_vram", "quantization", "text_quantization", "offload", "vae_tiling",
)  # fmt: skip
NO_SETTING = ("api_key", "api_key_file", "json")
CONNECTIONS = ("max_connections", "header_seconds", "write_seconds")  # what whoever holds the connections decides


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    add_model(parser)
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON when ready: url, model, pid")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is served, and how its weights are kept."""
    add = parser.add_argument
    add("--config", help="YAML of the model; not needed where the weights say what they are")
    add("--model_path", help="weights: path, hf://owner/repo/path, hub id or URL (default: asset/models/sana_tiny)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--dtype", help="fp32, bf16 or fp16 (default: fp32 on a CPU, else the config's)")
    add("--max_vram", metavar="AMOUNT", help="e.g. 8GB: settings of memory are planned before weights are loaded, for "
        "--max_active of the largest pictures; where --max_active is not given, fewer may be in work")  # fmt: skip
    add("--quantization", metavar="SCHEME", help=f"of the transformer: none, {', '.join(SCHEMES)}")
    add("--text_quantization", metavar="SCHEME", help="of the text encoder, by the same names")
    add("--offload", help="where weights wait on the CPU: none, model, group or sequential; the same pictures")
    add(
        "--vae_tiling",
        type=tiles,
        metavar="PIXELS|BOOL",
        help="side of the decoder's tiles; true: its own, false: none",
    )


def add_server(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds the options of the server itself, but those whose names are in `without`."""

    def add(flag: str, **more: Any) -> None:
        if flag.removeprefix("--") not in without:
            parser.add_argument(flag, **more)

    add("--model_name", help="what clients call the model (default: the name of its folder or repository)")
    add("--host", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, help="0 is any free one (default: 8000)")
    add("--public_url", help="what clients put before /files/... (default: the address that they asked)")
    add("--api_key", action="append", metavar="KEY", help="lets its bearer in; may be repeated; shown by ps")
    add("--api_key_file", action="append", metavar="FILE", help="keys, one a line; may be repeated")
    whole, seconds = {"type": int, "metavar": "N"}, {"type": float, "metavar": "S"}
    add("--max_active", **whole, help="pictures in work at a time (default: 8)")
    add("--max_queue", **whole, help="pictures that may wait; then 429 (default: 64)")
    add("--max_images", **whole, help="pictures of one request, n (default: 10)")
    add("--max_steps", **whole, help="steps of a picture (default: 100)")
    add("--max_pixels", **whole, help="of a picture (default: four times the model's own)")
    add("--max_prompt", **whole, help="characters of a prompt (default: 4000)")
    add("--max_body", **whole, help="bytes of a request (default: 65536)")
    add("--max_connections", **whole, help="open at a time (default: 512)")
    add("--request_seconds", **seconds, help="from a request to its pictures; then 504 (default: 600)")
    add("--body_seconds", **seconds, help="for a client to send a request; then 408 (default: 15)")
    add("--header_seconds", **seconds, help="for a client to send a head; then cut off (default: 10)")
    add("--write_seconds", **seconds, help="for a client to take an answer; then cut off (default: 60)")
    add("--grace_seconds", **seconds, help="for pictures in work at the end (default: 30)")
    add("--keep_files", **whole, help="pictures kept for response_format url (default: 1000)")
    add("--keep_bytes", **whole, help="bytes of those pictures (default: 1 GiB)")
    add("--keep_seconds", **seconds, help="how long they are kept (default: 3600)")
    add("--debug", action="store_true", help="tracebacks in the log; they may show paths and prompts")


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Serves; returns the exit code."""
    parser = build_parser(prog, description)
    given, rest = parse_with_overrides(parser, arguments)

    from sana.pipelines.command import run_command

    def work() -> int:
        from sana.serving.memory import keep_what_is_loaded, share_one_heap

        share_one_heap()  # before the imports below start threads
        from sana.pipelines.options import InferenceOptions
        from sana.serving.keys import read_keys
        from sana.serving.server import serve
        from sana.serving.settings import ServerSettings
        from sana.utils.logging import setup_logging

        setup_logging()
        model = InferenceOptions(overrides=rest, **{name: given[name] for name in MODEL if name in given})
        settings = ServerSettings(**server_settings(given, read_keys))

        def ready(url: str) -> None:
            from sana.pipelines.batch import name_pipeline
            from sana.serving.pictures import public_name

            line = url
            if "json" in given:
                name = settings.model_name or public_name(name_pipeline(model)[1])
                line = json.dumps({"url": url, "model": name, "pid": os.getpid()})
            keep_what_is_loaded()
            print(line, flush=True)

        return serve(model, settings, ready, lower="max_active" not in given)

    return run_command(work, debug=bool(given.get("debug")))


def server_settings(given: dict[str, Any], read_keys: Callable[[str], list[str]]) -> dict[str, Any]:
    """Returns the fields of `ServerSettings` among the options that were given.

    Args:
        given: options by name.
        read_keys: reads a file of keys.
    """
    files = [key for file in given.get("api_key_file", ()) for key in read_keys(file)]
    found = {name: value for name, value in given.items() if name not in (*MODEL, *NO_SETTING)}
    return found | {"api_keys": (*given.get("api_key", ()), *files)}
