"""Made-up results of the server's load test. No test is here."""

HELD = {"objects": 1000, "blocks": 5000, "native_bytes": 10**6, "tasks": 1, "threads": 9, "files": 12, "rest_mib": 90.0}
LOAD = {
    "clients": 2, "pictures": 9, "seconds": 3.0, "a_second": 3.0, "p50": 0.5, "p95": None, "p99": None, "failures": {},
}  # fmt: skip
CONTENT = {
    "environment": {
        "device": "cpu", "name": "CPU", "cpu": "CPU", "cores": 2, "threads": 2, "memory_gib": 8.0, "system": "Linux",
        "slug": "cpu", "python": "3", "versions": {"torch": "2"}, "date": "2026-01-01", "commit": "abc",
        "load_before": 0.1, "load_after": 0.2, "command": "python -m tools.bench.serve",
    },
    "model": "tiny", "seconds": 60.0, "wish": {"steps": 3, "size": "auto"}, "load": [LOAD],
    "one_at_a_time": [LOAD | {"a_second": 1.5, "p50": 0.9}],
    "hostile": {
        "requests": 5, "seconds": 1.0, "seed": 0, "server_errors": 0, "hanging": 0, "healthy_after": True,
        "same_picture": True, "wrong_errors": {}, "memory_mib": [(0, 100.0), (5, 101.0)],
        "statuses": {"slow": {"0": 2, "408": 3}},
        "memory": {
            "halves_mib": 0.5, "per_1000_mib": 0.1, "per_1000_error_mib": 0.2, "t": 0.5,
            "held_before": HELD, "held_after": HELD, "reasons": [], "flat": True,
        },
    },
    "complaints": [], "passed": True,
}  # fmt: skip
