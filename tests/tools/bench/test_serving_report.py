"""The load test's report, from made-up results."""

import copy

from tests.tools.bench.serving_results import CONTENT
from tools.bench.serving_report import markdown


def test_the_report_tells_everything():
    text = " ".join(markdown(CONTENT).split())
    assert "| 2 | 9 | 3.00 | 0.50 s | - | - |" in text and "| 2 | 3.00 | 1.50 | 2.00x | 0.50 s | 0.90 s |" in text
    assert "| slow | 0: 2, 408: 3 |" in text and "100.0 MiB before, 101.0 MiB after" in text
    assert "+0.50 MiB from half to half; +0.100 ± 0.200 MiB every 1000 requests: flat" in text
    assert "12 after the warm-up, 12 at the end" in text and "the same bits" in text
    assert "2026-01-01" in text and "`python -m tools.bench.serve`" in text and "| verdict | passed |" in text
    assert "Not passed" not in text


def test_what_did_not_pass_is_told():
    content = copy.deepcopy(CONTENT)
    content["complaints"], content["passed"] = ["3 server errors"], False
    content["hostile"]["memory"]["flat"] = None
    text = markdown(content)
    assert "## Not passed\n\n- 3 server errors" in text and "not passed" in text and "too few requests" in text


def test_the_tables_line_up():
    for block in markdown(CONTENT).split("\n\n"):
        widths = {len(line) for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block
