"""scripts/serve.py: its flags, exit codes, and the command as a user runs and ends it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import httpx
import openai
import pytest

from sana.serving import server
from sana.serving.settings import ServerSettings
from scripts.serve import build_parser, main

ROOT = Path(__file__).parents[2]
NOT_FLAGS = {"api_keys", "max_aspect"}


def test_every_setting_has_a_flag_and_its_default_is_said():
    helps = {action.dest: action.help for action in build_parser()._actions}
    for field in fields(ServerSettings):
        if field.name in NOT_FLAGS:
            continue
        assert field.name in helps
        if isinstance(field.default, int | float) and not isinstance(field.default, bool) and field.default != 2**30:
            assert f"(default: {field.default:g})".replace("6.5536e+04", "65536") in helps[field.name]


def test_flags_reach_the_server(monkeypatch, tmp_path, capsys):
    seen = []

    def serve(options, settings, on_ready, *, lower):
        on_ready("http://here")
        seen.append((options, settings, lower))
        return 0

    monkeypatch.setattr(server, "serve", serve)
    keys = tmp_path / "keys"
    keys.write_text("two\n")
    code = main(["--model_path=x", "--device=cpu", "--port=0", "--api_key=one", f"--api_key_file={keys}",
                 "--max_steps=7", "--debug", "--grace_seconds=2.5"])  # fmt: skip
    ((options, settings, lower),) = seen
    assert lower, "nobody has said how many pictures must be in work"
    assert (code, capsys.readouterr().out) == (0, "http://here\n")
    assert (options.model_path, options.device) == ("x", "cpu")
    assert settings == ServerSettings(port=0, api_keys=("one", "two"), max_steps=7, debug=True, grace_seconds=2.5)


def test_flags_of_memory_reach_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr(server, "serve", lambda options, settings, on_ready, *, lower: seen.append((options, lower)))
    assert main(["--max_vram=8GB", "--vae_tiling=256", "--offload=group", "--max_active=3"]) == 0
    ((options, lower),) = seen
    assert (options.max_vram, options.vae_tiling, options.offload, lower) == ("8GB", 256, "group", False)


def test_what_does_not_fit_is_said_before_anything_is_loaded(capsys):
    assert main(["--device=cpu", "--port=0", "--max_vram=1MB", "--max_active=1", "--quantization=none"]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: One picture in work of the largest size")


@pytest.mark.parametrize(
    "arguments", [["--port=70000"], ["--max_active=0"], ["--max_images=65"], ["--api_key="], ["--max_steps=100000"]]
)
def test_wrong_values_are_one_sentence_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_missing_files_are_exit_code_1(capsys, tmp_path):
    assert main([f"--api_key_file={tmp_path / 'none'}"]) == 1
    with pytest.raises(SystemExit) as ended:
        main(["--no_such_flag"])
    assert ended.value.code == 2


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = "import sys; sys.argv = ['x', '--help']; import scripts.serve as s\ntry: s.main()\nexcept SystemExit: pass"
    code += "\nassert not {'torch', 'fastapi', 'uvicorn', 'sana.pipelines'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--api_key_file" in done.stdout


def test_json_is_one_line_with_address_model_and_process(monkeypatch, capsys):
    monkeypatch.setattr(server, "serve", lambda options, settings, on_ready, **_: on_ready("http://here") or 0)
    for arguments, model in (([], "sana_tiny"), (["--model_name=mine"], "mine")):
        assert main(["--json", "--device=cpu", *arguments]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line) == {"url": "http://here", "model": model, "pid": os.getpid()}


def test_the_command_serves_the_bundled_model_and_sigterm_ends_it_with_0():
    """The picture in work when the signal comes is finished; nothing of a prompt is in the log."""
    command = [sys.executable, "scripts/serve.py", "--port=0", "--device=cpu", "--max_steps=1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), process.stderr.read()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            stream = client.images.generate(
                prompt="a secret circle", stream=True, size="64x64", extra_body={"steps": 60, "seed": 1}
            )
            assert next(stream).type == "image_generation.progress"
            process.send_signal(signal.SIGTERM)
            kinds = [event.type for event in stream]
            assert kinds[-1] == "image_generation.completed" and len(kinds) == 60
            log = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 0
    assert "secret" not in log and "Traceback" not in log and "POST /v1/images/generations 200" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
