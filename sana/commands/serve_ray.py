"""Serves pictures over HTTP with several replicas, on one machine or many, by Ray Serve: what `serve` serves, each.
Needs: pip install 'sana-python[ray]'

sana serve-ray                                    (the bundled model, 1 to 2 replicas on this machine)
sana serve-ray --model_path=hf://owner/repo --num_gpus=1 --min_replicas=2 --max_replicas=8
sana serve-ray --ray_address=HEAD:6379 --host=0.0.0.0 --api_key_file=keys.txt

Without --ray_address a Ray is started on this machine and ends with the command; its dashboard and its usage
statistics are off. The address is printed when replicas answer. SIGTERM and Ctrl-C end it as they end `serve`. Limits,
such as --max_active and --max_queue, hold for each replica. Exit codes: 0 ended as asked, 1 failure (weights, network,
address in use, no replica), 2 wrong usage.
"""

import argparse

from sana.commands.parsing import only_given, parse_with_overrides
from sana.commands.serve import CONNECTIONS, MODEL, add_model, add_server, server_settings

RAY = (
    "min_replicas", "max_replicas", "target_ongoing_requests", "num_cpus", "num_gpus", "upscale_seconds",
    "downscale_seconds", "ray_address", "ray_dir",
)  # fmt: skip


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    add = parser.add_argument_group("replicas").add_argument
    add("--min_replicas", type=int, metavar="N", help="that there always are (default: 1)")
    add("--max_replicas", type=int, metavar="N", help="that there may be under load (default: 2)")
    add("--target_ongoing_requests", type=float, metavar="X",
        help="requests at a time that a replica should have; more or fewer replicas follow (default: half of "
        "--max_active)")  # fmt: skip
    add("--num_cpus", type=float, metavar="X", help="CPUs of a replica; on a CPU also its threads (default: 1)")
    add("--num_gpus", type=float, metavar="X", help="GPUs of a replica; 0.5: two share one (default: 1; 0 on a CPU)")
    add("--upscale_seconds", type=float, metavar="S", help="of more load before there are more (default: 10)")
    add("--downscale_seconds", type=float, metavar="S", help="of less load before there are fewer (default: 300)")
    add("--ray_address", metavar="HOST:PORT", help="of a running Ray (default: one is started on this machine)")
    add("--ray_dir", metavar="FOLDER", help="for the logs and sockets of a Ray started here (default: /tmp/ray)")
    add_model(parser)
    add_server(parser, without=CONNECTIONS)
    return parser


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Serves; returns the exit code."""
    parser = build_parser(prog, description)
    given, rest = parse_with_overrides(parser, arguments)

    from sana.pipelines.command import run_command

    def work() -> int:
        from sana.pipelines.options import InferenceOptions
        from sana.serving.keys import read_keys
        from sana.serving.ray_options import RayOptions
        from sana.serving.ray_server import serve_ray
        from sana.serving.settings import ServerSettings
        from sana.utils.logging import setup_logging

        setup_logging()
        model = InferenceOptions(overrides=rest, **{name: given[name] for name in MODEL if name in given})
        replicas = RayOptions(**{name: given[name] for name in RAY if name in given})
        other = {name: value for name, value in given.items() if name not in RAY}
        settings = ServerSettings(**server_settings(other, read_keys))
        lower = "max_active" not in given
        return serve_ray(model, settings, replicas, lambda url: print(url, flush=True), lower=lower)

    return run_command(work, debug=bool(given.get("debug")))
