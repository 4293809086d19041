"""Pictures from words in a browser. Needs: pip install 'sana-python[gradio]'

sana app                                                       (the bundled model, http://127.0.0.1:15432)
sana app --model_path=hf://owner/repo --user=me --password=secret --host=0.0.0.0
DEMO_PORT=15432 python app/app_sana.py --share --config=x.yaml --model_path=hf://owner/repo/weights.pth

The address is printed when the page is ready. SIGTERM and Ctrl-C end it.
Exit codes: 0 ended as asked, 1 failure (weights, network, address in use), 2 wrong usage.
"""

import argparse
import os
import sys
from typing import Any

from sana.commands.parsing import only_given, parse_with_overrides

MODEL = ("config", "model_path", "device", "dtype", "quantization", "text_quantization", "offload")
DOOR = ("host", "port", "share", "user", "password", "password_file")


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    add = parser.add_argument
    add("--config", help="YAML of the model; not needed where the weights say what they are")
    add("--model_path", help="weights: path, hf://owner/repo/path, hub id or URL (default: asset/models/sana_tiny)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one)")
    add("--dtype", help="fp32, bf16 or fp16 (default: fp32 on a CPU, else the config's)")
    add("--quantization", metavar="SCHEME", help="of the transformer: none, int8, int8-dynamic, int4, nf4 or fp8")
    add("--text_quantization", metavar="SCHEME", help="of the text encoder, by the same names")
    add("--offload", help="where weights wait on the CPU: none, model, group or sequential; the same pictures")
    add = parser.add_argument_group("who may use it").add_argument
    add("--host", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, help="0 is any free one (default: the variable DEMO_PORT, else 15432)")
    add("--share", action="store_true", help="make a public link through Gradio's service")
    add("--user", metavar="NAME", help="lets in this person only, with ...")
    add("--password", metavar="WORD", help="... this password; shown by ps, unlike a file")
    add("--password_file", metavar="FILE", help="who is let in, one name:password a line")
    add("--max_queue", type=int, metavar="N", help="wishes that may wait; one more is told to come later (default: 16)")
    add = parser.add_argument_group("prompts").add_argument
    add("--safety", help="shield: ShieldGemma, where it can be had; basic: a list of words; off (default: shield)")
    add("--shield_model_path", metavar="PATH", help="ShieldGemma: folder or hub id (default: google/shieldgemma-2b)")
    add = parser.add_argument_group("what the page starts with").add_argument
    add("--image_size", type=int, metavar="SIDE", help="of square pictures, in pixels (default: the model's own)")
    add("--custom_image_size", type=int, metavar="SIDE", help="the same")
    add("--cfg_scale", type=float, help="classifier-free guidance; 1 is off (default: 5)")
    add("--pag_scale", type=float, help="perturbed-attention guidance; 1 is off (default: 2)")
    add("--step", type=int, help="sampling steps; -1 for the sampler's default")
    add("--seed", type=int, help="(default: 0)")
    add("--max_images", type=int, metavar="N", help="pictures of one wish at most (default: 8)")
    add("--bs", type=int, help="pictures in one call of the transformer (default: 1)")
    add("--output", metavar="FOLDER", help="keep every picture with its recipe here (default: none is kept)")
    add("--debug", action="store_true", help="tracebacks of errors")
    return parser


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Shows the page until it is asked to end; returns the exit code."""
    given, overrides = parse_with_overrides(build_parser(prog, description), arguments)

    from sana.pipelines.command import run_command

    return run_command(lambda: serve(given, overrides), debug=bool(given.get("debug")))


def serve(given: dict[str, Any], overrides: list[str]) -> int:
    """Loads what the options name and shows the page; what can fail early does, before weights are loaded."""
    from app.launch import need_gradio, open_door
    from app.safety_check import open_safety_check, require_shield
    from sana.pipelines import batch
    from sana.pipelines.options import InferenceOptions
    from sana.pipelines.prompts import PromptItem
    from sana.utils.logging import setup_logging

    setup_logging()
    door, options = read_door(given), read_options(given)
    model = InferenceOptions(overrides=overrides, **{name: given[name] for name in MODEL if name in given})
    need_gradio()
    require_shield(options)
    pipeline, model = batch.open_pipeline(model, [PromptItem(id="any", prompt="any")])
    safety = open_safety_check(options)

    from app.demo import build_demo, launch_settings

    demo = build_demo(pipeline, options, safety, opened_with=model)
    return open_door(demo, door, launch_settings(), lambda url: print(url, flush=True))


def read_door(given: dict[str, Any]) -> Any:
    """Returns the `Door` that the options name, its port free."""
    from app.launch import Door, choose_port, free_port, read_logins

    host = given.get("host", Door.host)
    port = free_port(host, choose_port(given.get("port"), os.environ.get("DEMO_PORT")))
    logins = read_logins(given.get("user"), given.get("password"), given.get("password_file"))
    return Door(host, port, given.get("share", False), logins)


def read_options(given: dict[str, Any]) -> Any:
    """Returns the `DemoOptions` that the options name."""
    from app.options import DemoOptions

    more = {name: value for name, value in given.items() if name not in (*MODEL, *DOOR, "debug")}
    side = more.pop("custom_image_size", None)
    if side is not None and more.setdefault("image_size", side) != side:
        raise ValueError("image_size and custom_image_size were both given, and differ; give one of them.")
    required = given.get("safety") == "shield" or "shield_model_path" in given
    return DemoOptions(safety_required=required, device=given.get("device"), **more)


def __getattr__(name: str) -> Any:
    if name != "build_demo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from app.demo import build_demo  # imports Gradio

    return build_demo


if __name__ == "__main__":
    sys.exit(main(description=__doc__))
