"""scripts/serve_ray.py: its flags, and (slow) the command as a user runs it, with a Ray of its own on this machine."""

import base64
import io
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving import ray_server
from sana.serving.ray_options import RayOptions
from sana.serving.settings import ServerSettings
from scripts.serve_ray import build_parser, main

ROOT = Path(__file__).parents[2]
WAIT = 400  # seconds: Ray starts ten processes, and replicas load a model each, on a machine that may be busy
SIGNED = "x-sana-replica"
STEP = {"prompt": "a cat", "size": "64x64", "steps": 1}


def test_every_option_of_replicas_has_a_flag_and_its_default_is_said():
    helps = {action.dest: action.help for action in build_parser()._actions}
    for field in fields(RayOptions):
        assert field.name in helps
        if field.default is not None:
            assert f"(default: {field.default:g})" in helps[field.name]


def test_flags_of_connections_which_ray_holds_are_not_there(capsys):
    for name in ("max_connections", "header_seconds", "write_seconds"):
        with pytest.raises(SystemExit) as ended:
            main([f"--{name}=5"])
        assert ended.value.code == 2 and name in capsys.readouterr().err


def test_flags_reach_the_service(monkeypatch, tmp_path, capsys):
    seen = []

    def serve_ray(*arguments, lower):
        *rest, on_ready = arguments
        on_ready("http://here")
        seen.append((*rest, lower))
        return 0

    monkeypatch.setattr(ray_server, "serve_ray", serve_ray)
    keys = tmp_path / "keys"
    keys.write_text("two\n")
    code = main(["--model_path=x", "--device=cpu", "--min_replicas=2", "--max_replicas=6", "--num_cpus=0.5", "--port=0",
                 "--target_ongoing_requests=3", f"--api_key_file={keys}", "--grace_seconds=5"])  # fmt: skip
    ((options, settings, replicas, lower),) = seen
    assert (code, capsys.readouterr().out, lower) == (0, "http://here\n", True)
    assert (options.model_path, options.device) == ("x", "cpu")
    assert settings == ServerSettings(port=0, api_keys=("two",), grace_seconds=5)
    assert replicas == RayOptions(2, 6, target_ongoing_requests=3, num_cpus=0.5)


@pytest.mark.parametrize("arguments", [["--min_replicas=0"], ["--max_replicas=0"], ["--num_cpus=-1"], ["--port=70000"]])
def test_wrong_values_are_one_sentence_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_without_ray_a_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert main([]) == 2
    assert "pip install 'sana-python[ray]'" in capsys.readouterr().err


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = "import sys; sys.argv = ['x', '--help']; import scripts.serve_ray as s\n"
    code += "try: s.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'fastapi', 'uvicorn', 'sana.pipelines'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--min_replicas" in done.stdout


class Command:
    """The command in a process of its own, with a Ray whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("ray.serve", reason="needs Ray: pip install 'sana-python[ray]'")
        flags = ["--port=0", "--device=cpu", "--num_cpus=0.5", "--min_replicas=1", "--max_replicas=2",
                 "--target_ongoing_requests=1", "--upscale_seconds=1", "--downscale_seconds=3600",
                 "--max_steps=10000", "--grace_seconds=200", f"--ray_dir={folder}"]  # fmt: skip
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else Ray writes one into the home
        self.log = folder / "log"
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | token
        self.process = subprocess.Popen(
            [sys.executable, "scripts/serve_ray.py", *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.family: set[psutil.Process] = set()

    def ready(self) -> None:
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.log.read_text()[-4000:]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=WAIT)

    def post(self, **content) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json={**STEP, **content}, timeout=WAIT)

    def processes(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.family.update(found)
        return found

    def replicas(self) -> list[psutil.Process]:
        return [one for one in self.processes() if "ServeReplica" in _title(one)]

    def until(self, condition) -> None:
        end = time.monotonic() + WAIT
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.2)  # between two looks; nothing is asserted about time

    def close(self) -> None:
        """Ends whatever is left, by its own number."""
        if self.process.poll() is None:
            self.processes()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for one in self.family:
            if one.is_running():
                one.kill()
        self.process.stdout.close()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    made = Command(tmp_path_factory.mktemp("ray"))
    try:
        made.ready()
        yield made
    finally:
        made.close()


def as_array(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.slow
def test_a_picture_is_the_offline_one_also_as_a_stream(command):
    pipeline = SanaPipeline.from_pretrained(ROOT / "asset/models/sana_tiny", device="cpu")
    options = {"num_inference_steps": 3, "seed": 5, "output_type": "pil", "progress_bar": False}
    offline = [np.asarray(one) for one in pipeline("a secret circle", 64, 96, num_images_per_prompt=2, **options)]
    wish = {"prompt": "a secret circle", "size": "96x64", "extra_body": {"seed": 5, "steps": 3}}
    answer = command.client().images.generate(n=2, **wish)
    assert all(np.array_equal(as_array(one.b64_json), wanted) for one, wanted in zip(answer.data, offline, strict=True))
    *told, last = list(command.client().images.generate(stream=True, **wish))
    assert [one.type for one in told] == ["image_generation.progress"] * 3
    assert np.array_equal(as_array(last.b64_json), offline[0])


@pytest.mark.slow
def test_errors_are_those_of_the_single_server(command):
    with pytest.raises(openai.BadRequestError) as bad:
        command.client().images.generate(prompt="a cat", n=99)
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    missing = httpx.get(f"{command.url}/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{command.url}/health").json() == {"status": "ok", "live": True, "ready": True}


@pytest.mark.slow
def test_replicas_grow_under_load_share_it_and_a_killed_one_comes_back(command):
    """Load are streams that do not end; each ends with its client, which is what the last lines look at."""
    body = {**STEP, "stream": True, "steps": 10_000}
    with ExitStack() as load:
        streams = []  # one that nobody holds is closed
        for _ in range(3):
            stream = httpx.stream("POST", f"{command.url}/v1/images/generations", json=body, timeout=WAIT)
            streams.append(load.enter_context(stream).iter_lines())
            assert "image_generation.progress" in next(streams[-1])
        command.until(lambda: len(command.replicas()) == 2)
        names = _names(command, 2)
    command.until(lambda: _active(command) == dict.fromkeys(names, 0.0))
    kept = command.post(response_format="url").json()["data"][0]["url"]
    fetched: dict[str, bytes] = {}
    command.until(lambda: _fetch(kept, fetched) >= names)
    assert len(set(fetched.values())) == 1, "whoever is asked has the picture"
    victim = command.replicas()[0]
    victim.kill()
    command.until(lambda: len(command.replicas()) == 2 and victim not in command.replicas())
    assert _names(command, 2, names) - names, "another one has taken its place"


def _names(command, count, before=frozenset()) -> set[str]:
    """Returns the names of replicas that answer with pictures, when there are so many, one of them not in `before`."""
    found: set[str] = set()

    def one() -> bool:
        answer = command.post()
        if answer.status_code == 200:
            found.add(answer.headers[SIGNED])
        return len(found) >= count and (not before or bool(found - before))

    command.until(one)
    return found


def _active(command) -> dict[str, float]:
    """Returns pictures in work by replica, as told by whichever are asked: both, before long."""
    told: dict[str, float] = {}
    for _ in range(20):
        page = httpx.get(f"{command.url}/metrics", timeout=WAIT)
        (line,) = [line for line in page.text.splitlines() if line.startswith("sana_active{")]
        told[page.headers[SIGNED]] = float(line.rpartition(" ")[2])
    return told


def _fetch(url, fetched) -> set[str]:
    answer = httpx.get(url, timeout=WAIT)
    assert answer.status_code == 200
    fetched[answer.headers[SIGNED]] = answer.content
    return set(fetched)


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_work_and_leaves_no_process(command):
    command.processes()
    stream = command.client().images.generate(
        stream=True, prompt="a secret cat", size="64x64", extra_body={"steps": 80, "seed": 1}
    )
    assert next(stream).type == "image_generation.progress"
    command.processes()
    command.process.send_signal(signal.SIGTERM)
    refused: list[httpx.Response] = []
    asker = threading.Thread(target=lambda: command.until(lambda: _refused(command, refused)), daemon=True)
    asker.start()
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_generation.completed" and len(kinds) == 80
    assert command.process.wait(WAIT) == 0
    asker.join(WAIT)
    assert refused[0].json()["error"]["code"] == "server_shutting_down" and int(refused[0].headers["retry-after"]) > 0
    gone, left = psutil.wait_procs(command.family, timeout=60)
    assert gone and not left, [_title(one) for one in left]
    folder = command.log.parent
    for file in (one for one in folder.rglob("*") if one.is_file() and not one.is_symlink()):
        assert b"secret" not in file.read_bytes(), f"{file} names a prompt"
    assert not list(folder.rglob("usage_stats.json")), "Ray was to tell nobody"


def _refused(command, refused) -> bool:
    try:
        answer = command.post()
    except httpx.HTTPError:
        return False
    if answer.status_code == 503:
        refused.append(answer)
    return bool(refused)
