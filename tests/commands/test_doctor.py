"""sana doctor: exit codes, text and JSON of a diagnosis."""

import json

import pytest

from sana.commands import doctor
from sana.pipelines.doctor import Diagnosis, Finding

FINE = Finding("packages", "torch", "ok", "2.11.0", None, {"version": "2.11.0"})
AWAY = Finding("extras", "gradio", "absent", "needs gradio>=6", "pip install 'sana-python[gradio]'")
BAD = Finding("packages", "numpy", "broken", "not installed", "pip install 'numpy<2.4'")


@pytest.fixture
def found(monkeypatch):
    """Sets what is found; returns whether the model was to be looked at."""
    asked = []

    def put(*findings):
        monkeypatch.setattr(
            doctor, "diagnose", lambda self_check: asked.append(self_check) or Diagnosis(tuple(findings))
        )
        return asked

    return put


def test_in_order_is_0_although_an_extra_is_away(found, capsys):
    asked = found(FINE, AWAY)
    assert doctor.main([]) == 0
    shown = capsys.readouterr()
    assert "ok  torch   2.11.0" in shown.out and "--  gradio" in shown.out and shown.err == ""
    assert "-> pip install 'sana-python[gradio]'" in shown.out and asked == [True]


def test_broken_is_1_and_the_last_lines_say_what_to_run(found, capsys):
    found(FINE, BAD, AWAY)
    assert doctor.main(["--no_model"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Something that is needed is not in order. Run:",
        "  pip install 'numpy<2.4'",
    ]


def test_json(found, capsys):
    asked = found(BAD, FINE)
    assert doctor.main(["--json", "--no_model"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] is False and content["fixes"] == ["pip install 'numpy<2.4'"] and asked == [False]
    assert content["findings"][1]["data"] == {"version": "2.11.0"}
