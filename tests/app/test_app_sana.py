"""The command of the web app: where options go, one sentence for what cannot be, start and end as a process."""

import importlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app import app_sana
from app.app_sana import build_parser, main, read_door, read_options
from sana.commands.parsing import parse_with_overrides
from tests.app.conftest import ROOT, WAIT, AppProcess, environment

OFFICIAL = (
    "--share --config=configs/sana_config/1024ms/Sana_1600M_img1024.yaml "
    "--model_path=hf://Efficient-Large-Model/Sana_1600M_1024px/checkpoints/Sana_1600M_1024px.pth --image_size=1024"
)


def options(line):
    return read_options(parse_with_overrides(build_parser(), line.split())[0])


def test_options_go_where_they_belong():
    made = options(
        "--image_size=512 --cfg_scale=4 --pag_scale=1 --seed=7 --step=5 --bs=2 --output=kept --max_queue=3 "
        "--max_images=4 --safety=basic --device=cpu --host=0.0.0.0 --user=me --password=x --model_path=m --debug"
    )
    assert (made.image_size, made.cfg_scale, made.pag_scale, made.seed, made.step, made.bs) == (512, 4.0, 1.0, 7, 5, 2)
    assert (made.output, made.max_queue, made.max_images, made.safety, made.device) == ("kept", 3, 4, "basic", "cpu")
    assert options("--custom_image_size=256").image_size == options("--image_size=256").image_size == 256


@pytest.mark.parametrize(
    ("line", "required"),
    [("", False), ("--safety=basic", False), ("--safety=shield", True), ("--shield_model_path=google/x", True)],
)
def test_shieldgemma_that_is_named_is_required(line, required):
    assert options(line).safety_required == required


def test_the_door(monkeypatch):
    monkeypatch.setenv("DEMO_PORT", "0")
    door = read_door({})
    assert (door.host, door.share, door.logins) == ("127.0.0.1", False, ()) and door.port > 0
    door = read_door({"host": "localhost", "port": door.port, "share": True, "user": "me", "password": "x"})
    assert (door.host, door.share, door.logins) == ("localhost", True, (("me", "x"),))
    monkeypatch.delenv("DEMO_PORT")
    monkeypatch.setattr("app.launch.free_port", lambda host, port: port)
    assert read_door({}).port == 15432


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        (OFFICIAL, 1, "gemma-2-2b-it"),
        ("--model_path=hf://nobody/nothing", 1, "hf://nobody/nothing"),
        ("--safety=shield", 1, "ShieldGemma cannot be had"),
        ("--shield_model_path=nobody/shield", 1, "nobody/shield"),
        ("--safety=basic --shield_model_path=x", 2, "uses no model"),
        ("--safety=none", 2, "safety must be one of shield, basic, off"),
        ("--password=secret", 2, "user and password belong together"),
        ("--password_file=nowhere", 1, "nowhere"),
        ("--image_size=512 --custom_image_size=256", 2, "image_size and custom_image_size"),
        ("--cfg_scale=0", 2, "cfg_scale must be"),
        ("--model.depth=3", 2, "needs --config"),
        ("--device=gpu", 2, "Unknown device"),
        ("--offload=disk", 2, "offload must be one of"),
    ],
)
def test_what_cannot_be_is_one_sentence(line, code, complaint, capsys):
    """And it is said before weights are loaded."""
    assert main([*line.split(), "--port=0"]) == code
    shown = capsys.readouterr()
    errors = [one for one in shown.err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and complaint in errors[0] and shown.out == "" and "Traceback" not in shown.err
    assert "loading" not in shown.err and "secret" not in shown.err


def test_an_address_in_use_is_said_first(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("DEMO_PORT", str(taken.getsockname()[1]))
        assert main(["--model_path=nowhere.pth"]) == 1
    assert "Cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_without_a_network_share_is_one_sentence(small_folder, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs: pip install 'sana-python[gradio]'")

    def unreachable(**_):
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr("gradio.networking.setup_tunnel", unreachable)
    assert main([f"--model_path={small_folder}", "--device=cpu", "--port=0", "--share"]) == 1
    shown = capsys.readouterr()
    assert "without --share" in shown.err and shown.out == "" and "frpc" not in shown.err


def test_the_page_is_reachable_by_the_released_name():
    pytest.importorskip("gradio", reason="needs: pip install 'sana-python[gradio]'")
    assert app_sana.build_demo is importlib.import_module("app.demo").build_demo
    with pytest.raises(AttributeError, match="build_page"):
        _ = app_sana.build_page


def test_help_needs_no_gradio_and_no_torch():
    """From another folder, as a script: its own folder comes first where modules are looked for."""
    code = (
        f"import runpy, sys\nsys.argv = ['app_sana.py', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'app/app_sana.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    sys.exit(end.code or ', '.join(n for n in ('gradio', 'torch', 'transformers') if n in sys.modules) or 0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    assert "DEMO_PORT" in done.stdout and "--share" in done.stdout


def test_the_guide_is_right_about_options():
    text = (ROOT / "asset/docs/web_app.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    calls = re.findall(r"^(?:sana app|DEMO_PORT=\d+ +python app/app_sana\.py)(.*)$", blocks, re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        assert parse_with_overrides(build_parser(), shlex.split(call))[1] == []
    options = {name for action in build_parser()._actions for name in action.option_strings if name.startswith("--")}
    assert options - {"--help"} == set(re.findall(r"`(--[a-z_]+)[`=]", text.replace("--section.key=value", "")))


def test_as_a_process_it_says_where_it_is_and_ends_when_asked(small_folder, tmp_path):
    """Started from another folder, on a port of DEMO_PORT; SIGINT is sent in tests/app/browser."""
    pytest.importorskip("gradio", reason="needs: pip install 'sana-python[gradio]'")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    app = AppProcess(f"--model_path={small_folder}", "--device=cpu", cwd=tmp_path, DEMO_PORT=str(port))
    try:
        assert app.url == f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(app.url, timeout=WAIT) as answer:
            assert answer.status == 200 and b'"title":"Sana"' in answer.read()
        assert "prompts are not checked" in app.log
    finally:
        code = app.end(signal.SIGTERM)
    assert code == 0, app.log
    assert app.ended_silently and "Traceback" not in app.log
    assert list(Path(tmp_path).iterdir()) == []
