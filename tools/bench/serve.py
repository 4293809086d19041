"""Loads a server as its users will, and as its enemies will: throughput, latency, hostile requests, memory.

    python -m tools.bench.serve                                # the bundled model, about five minutes
    python -m tools.bench.serve --clients 1,4 --seconds 5 --hostile 500

A server of its own is started (scripts/serve.py). Clients ask for one picture after another, each as soon as it has the
last. Then come the hostile requests, 16 at a time. Writes serve-DEVICE.{json,md}; the table comes last on stdout.
Exit codes: 0 done, 1 the server failed a request that it should have answered, ended, or grew; 2 wrong arguments.
"""

import argparse
import asyncio
import collections
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.bench.hostile import GOOD, KINDS, Target, draw, exchange, head, posted

ROOT = Path(__file__).parents[2]
AT_ONCE = 16  # hostile requests
ALLOWED_5XX = (501, 503)  # not there yet; too many connections
GROWTH_MIB = 32.0  # that memory may grow by between the first fifth of the hostile requests and the last
ENOUGH = 20  # latencies below which no percentile beyond the median is told
PATIENCE_SECONDS = 60
SETTLING = 400  # pictures of one step before the hostile requests: the allocator of a new process still takes memory


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
    add("--seconds", type=float, default=25.0, help="of asking, for each number of clients [25]")
    add("--steps", type=int, default=20, help="of every picture [20]")
    add("--size", default="auto", help="of every picture [auto: the model's own]")
    add("--hostile", type=int, default=10_000, help="number of hostile requests [10000]")
    add("--seed", type=int, default=0, help="of the hostile requests [0]")
    add("--model_path", help="[the bundled model]")
    add("--device", default="cpu", help="[cpu]")
    add("--output", type=Path, default=ROOT / "output/benchmarks", metavar="DIR", help="[output/benchmarks]")
    return parser


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[Target, int]]:
    """Runs a server; gives where it listens, and its process id. It must end with exit code 0."""
    command = [sys.executable, "scripts/serve.py", "--port=0", f"--device={options.device}", "--max_queue=128",
               "--header_seconds=2", "--body_seconds=2", "--grace_seconds=5"]  # fmt: skip
    command += [f"--model_path={options.model_path}"] if options.model_path else []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"the server did not start: {shlex.join(command)}")
            host, _, port = url.removeprefix("http://").rpartition(":")
            yield Target(host, int(port)), process.pid
            process.terminate()
            code = process.wait(PATIENCE_SECONDS)
            if code:
                raise RuntimeError(f"the server ended with exit code {code}")
        finally:
            process.kill()


def resident_mib(pid: int) -> float:
    """Memory of a process that is in RAM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


async def load(target: Target, clients: int, seconds: float, wish: dict[str, Any]) -> dict[str, Any]:
    """Lets clients ask for pictures; the first seconds of each are measured like the others."""
    latencies: list[float] = []
    failures: collections.Counter[str] = collections.Counter()
    started = time.monotonic()

    async def client(number: int) -> None:
        turn = 0
        while time.monotonic() - started < seconds:
            body = json.dumps(wish | {"seed": number * 10_000 + turn}).encode()
            began = time.monotonic()
            status, answer = await exchange(target, posted(body))
            if status == 200 and b"b64_json" in answer:
                latencies.append(time.monotonic() - began)
            else:
                failures[str(status)] += 1
            turn += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    took = time.monotonic() - started
    told = {"clients": clients, "pictures": len(latencies), "seconds": took, "a_second": len(latencies) / took}
    if latencies:
        told["p50"] = statistics.median(latencies)
        enough = len(latencies) >= ENOUGH
        told |= {f"p{one}": percentile(latencies, one) if enough else None for one in (95, 99)}
    return told | {"failures": dict(failures)}


async def settle(target: Target) -> None:
    """Has as many short pictures made at once as hostile requests will come, until memory no longer grows by that."""
    coming = iter(range(SETTLING))

    async def client() -> None:
        for seed in coming:
            await exchange(target, posted(json.dumps(GOOD | {"seed": seed}).encode()))

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))


async def attack(target: Target, pid: int, count: int, seed: int) -> dict[str, Any]:
    """Sends hostile requests and watches the server's memory."""
    rng = random.Random(seed)
    statuses: dict[str, collections.Counter[int]] = {name: collections.Counter() for name in KINDS}
    memory: list[tuple[int, float]] = [(0, resident_mib(pid))]
    hanging = 0
    kinds = [(draw(rng), rng.randrange(2**32)) for _ in range(count)]
    coming = iter(kinds)
    done = 0
    started = time.monotonic()

    async def enemy() -> None:
        nonlocal done, hanging
        for name, own_seed in coming:
            try:
                statuses[name][await KINDS[name][0](target, random.Random(own_seed))] += 1
            except TimeoutError:
                hanging += 1
            done += 1
            if done % max(1, count // 20) == 0:
                memory.append((done, resident_mib(pid)))
                sys.stderr.write(f"\rhostile: {done} of {count}")

    await asyncio.gather(*(enemy() for _ in range(AT_ONCE)))
    took = time.monotonic() - started
    while True:  # what leavers asked for is given up between steps; then the server is as it was
        _, page = await exchange(target, head("GET", "/metrics"))
        if b"sana_active 0.0" in page and b"sana_queued 0.0" in page:
            break
    memory.append((done, resident_mib(pid)))
    bad = sum(number for counts in statuses.values() for code, number in counts.items()
              if code >= 500 and code not in ALLOWED_5XX)  # fmt: skip
    settled = next(mib for place, mib in memory if place >= count // 5)
    status, _ = await exchange(target, head("GET", "/health"))
    return {
        "requests": done, "seconds": took, "server_errors": bad, "hanging": hanging, "healthy_after": status == 200,
        "memory_mib": memory, "growth_mib": memory[-1][1] - settled,
        "statuses": {name: {str(code): number for code, number in sorted(counts.items())}
                     for name, counts in statuses.items()},
    }  # fmt: skip


def passed(content: dict[str, Any]) -> bool:
    """Whether the server answered every good request and bore every hostile one."""
    hostile = content["hostile"]
    good = not any(one["failures"] for one in content["load"]) and all(one["pictures"] for one in content["load"])
    bore = not hostile["server_errors"] and not hostile["hanging"] and hostile["healthy_after"]
    return good and bore and hostile["growth_mib"] <= GROWTH_MIB


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    about, hostile = content["environment"], content["hostile"]
    memory = [mib for _, mib in hostile["memory_mib"]]
    lines = [
        f"# Serving: {about['name']}, {about['cores']} cores",
        "",
        f"{about['date']}, torch {about['versions']['torch']}, {content['wish']['steps']} steps, "
        f"size {content['wish']['size']}, load before {about['load_before']}. `{about['command']}`",
        "",
        "| clients | pictures | a second | p50 s | p95 s | p99 s |",
        "|---|---|---|---|---|---|",
    ]
    for one in content["load"]:
        times = " | ".join(seconds(one.get(f"p{percent}")) for percent in (50, 95, 99))
        lines.append(f"| {one['clients']} | {one['pictures']} | {one['a_second']:.2f} | {times} |")
    lines += [
        "",
        f"{hostile['requests']} hostile requests in {hostile['seconds']:.0f} s: "
        f"{hostile['server_errors']} server errors, {hostile['hanging']} without an answer, "
        f"healthy after: {hostile['healthy_after']}.",
        f"Resident memory {memory[0]:.0f} MiB before, {memory[-1]:.0f} MiB after, "
        f"{hostile['growth_mib']:+.1f} MiB since the first fifth.",
        "",
        "| hostile kind | answers (0: connection ended) |",
        "|---|---|",
    ]
    for name, counts in hostile["statuses"].items():
        lines.append(f"| {name} | {', '.join(f'{code}: {number}' for code, number in counts.items())} |")
    return "\n".join(lines) + "\n"


async def measure(options: argparse.Namespace, target: Target, pid: int) -> dict[str, Any]:
    """Runs everything against a server."""
    wish = {"prompt": "a red circle left of a blue square", "steps": options.steps, "size": options.size}
    await load(target, 1, 1.0, wish)  # warm
    found = []
    for clients in options.clients:
        sys.stderr.write(f"\r{clients} clients   ")
        found.append(await load(target, clients, options.seconds, wish))
    await settle(target)
    hostile = await attack(target, pid, options.hostile, options.seed)
    sys.stderr.write("\n")
    return {"wish": wish, "load": found, "hostile": hostile}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.hostile < 1 or not options.seconds > 0:
        parser.error("--hostile and --seconds must be positive")
    from tools.bench.environment import collect

    environment = collect("cpu" if options.device == "cpu" else "cuda", arguments)
    environment["command"] = shlex.join(["python", "-m", "tools.bench.serve", *arguments])
    with server(options) as (target, pid):
        content = {"environment": environment, **asyncio.run(measure(options, target, pid))}
    content["passed"] = passed(content)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"serve-{environment['slug']}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table(content), encoding="utf-8")
    print(table(content))
    return 0 if content["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
