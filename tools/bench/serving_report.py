"""The results of the server's load test as Markdown. Nothing is measured or judged here."""

from collections.abc import Sequence
from typing import Any

from tools.bench.report import table


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    lines = [f"# Serving: {content['environment']['name']}, {content['environment']['cores']} cores", ""]
    lines += [*about(content), "", "## Load", "", *load_table(content), "", "## The cost of batching", ""]
    lines += [*batching(content), "", "## Hostile requests", "", *hostile(content)]
    if content["complaints"]:
        lines += ["", "## Not passed", "", *(f"- {one}" for one in content["complaints"])]
    return "\n".join(lines) + "\n"


def about(content: dict[str, Any]) -> list[str]:
    """Machine, versions, date, command."""
    known, wish = content["environment"], content["wish"]
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    cores = f"{known['cores']} cores, {known['threads']} threads"
    machine = f"{known['cpu']}, {cores}, {known['memory_gib']} GiB; {known['system']}"
    if known["device"] != "cpu":
        machine = f"{known['name']}, {known['gpu_memory_gib']} GiB, CUDA {known['cuda']}; {machine}"
    took = f"{content['seconds']:.0f} s; load of the machine {known['load_before']} before, {known['load_after']} after"
    return table([
        ["", ""], ["machine", machine], ["versions", f"python {known['python']}, {versions}"],
        ["date, commit", f"{known['date']}, {known['commit']}"], ["command", f"`{known['command']}`"], ["took", took],
        ["pictures", f"model {content['model']}, {wish['steps']} steps, size {wish['size']}"],
        ["verdict", "passed" if content["passed"] else "not passed"],
    ])  # fmt: skip


def load_table(content: dict[str, Any]) -> list[str]:
    """Throughput and latency by number of clients."""
    rows = [["clients", "pictures", "pictures a second", "p50", "p95", "p99"]]
    for one in content["load"]:
        times = [seconds(one.get(f"p{percent}")) for percent in (50, 95, 99)]
        rows.append([str(one["clients"]), str(one["pictures"]), f"{one['a_second']:.2f}", *times])
    return table(rows)


def batching(content: dict[str, Any]) -> list[str]:
    """The same load on a server that makes one picture after the other."""
    rows = [["clients", "pictures a second", "with --max_active=1", "ratio", "p50", "with --max_active=1"]]
    together = {one["clients"]: one for one in content["load"]}
    for alone in content["one_at_a_time"]:
        one = together[alone["clients"]]
        ratio = f"{one['a_second'] / alone['a_second']:.2f}x" if alone["a_second"] else ""
        speeds = [f"{one['a_second']:.2f}", f"{alone['a_second']:.2f}", ratio]
        rows.append([str(one["clients"]), *speeds, seconds(one.get("p50")), seconds(alone.get("p50"))])
    return table(rows)


def hostile(content: dict[str, Any]) -> list[str]:
    """What hostile requests got, and what became of the server."""
    found = content["hostile"]
    memory = found["memory"]
    before, after = memory["held_before"], memory["held_after"]
    samples = [mib for _, mib in found["memory_mib"]]
    flat = {True: "flat", False: "not flat", None: "too few requests to judge"}[memory["flat"]]
    drift = f"{memory['per_1000_mib']:+.3f} ± {memory['per_1000_error_mib']:.3f} MiB every 1000 requests"
    rows = [
        ["", ""],
        ["requests", f"{found['requests']} in {found['seconds']:.0f} s, seed {found['seed']}"],
        ["server errors", str(found["server_errors"])],
        ["without an answer for a minute", str(found["hanging"])],
        ["errors of another form, or that tell too much", str(sum(found["wrong_errors"].values()))],
        ["healthy after", "yes" if found["healthy_after"] else "no"],
        ["a picture before, after, and offline", "the same bits" if found["same_picture"] else "not the same bits"],
        ["memory (not backed by files)", f"{samples[0]:.1f} MiB before, {samples[-1]:.1f} MiB after"],
        ["under load after the warm-up", f"{memory['halves_mib']:+.2f} MiB from half to half; {drift}: {flat}"],
    ]
    for name, words in (("objects", "objects"), ("tasks", "tasks"), ("threads", "threads"), ("files", "open files"),
                        ("blocks", "Python's memory blocks"), ("native_bytes", "bytes in use by malloc"),
                        ("rest_mib", "memory at rest, MiB")):  # fmt: skip
        rows.append([words, f"{before[name]:.9g} after the warm-up, {after[name]:.9g} at the end"])
    return [*table(rows), "", *table(_statuses(found["statuses"]))]


def _statuses(statuses: dict[str, dict[str, int]]) -> Sequence[Sequence[str]]:
    rows = [["hostile kind", "answers (0: connection ended)"]]
    return rows + [
        [name, ", ".join(f"{code}: {number}" for code, number in counts.items())] for name, counts in statuses.items()
    ]


def seconds(value: float | None) -> str:
    """A time, or "-" where there were too few to tell."""
    return "-" if value is None else f"{value:.2f} s"
