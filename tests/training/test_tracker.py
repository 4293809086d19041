"""What reaches the files of TensorBoard and of wandb, read back; and what happens when a tracker is not there."""

import json
import struct
import sys

import pytest
from PIL import Image

from sana.config import ConfigError
from sana.training.tracker import Tracker, TrackerError, build_tracker, parse_report_to

RUN = {"name": "tiny", "project": "tests", "config": {"train": {"seed": 1}, "data_dir": ["a"]}}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "step_00000002.png"
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)
    return path


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """wandb as on a machine that never saw it: no key, no login, no settings; its files below tmp_path."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    wandb.teardown()


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("", ()), (None, ()), ("none", ()), ("wandb", ("wandb",)), ("TensorBoard", ("tensorboard",)),
        (" wandb, tensorboard,", ("tensorboard", "wandb")), ("all", ("tensorboard", "wandb")),
    ],
)  # fmt: skip
def test_names(report_to, names):
    assert parse_report_to(report_to) == names


@pytest.mark.parametrize(
    ("report_to", "words"),
    [("tensorbord", "Did you mean 'tensorboard'"), ("wandb,none", "none cannot stand"), ("comet", "Known: ")],
)
def test_wrong_names(report_to, words):
    with pytest.raises(ConfigError, match=words):
        parse_report_to(report_to)


def events(work_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(work_dir / "tensorboard")).Reload()


def test_tensorboard_gets_numbers_and_pictures(tmp_path, picture):
    tracker = build_tracker("tensorboard", tmp_path / "run", **RUN, resume=False)
    tracker.log({"loss": 0.5, "lr": 1e-4}, 1)
    tracker.log({"loss": 0.25}, 2)
    tracker.image("validation", picture, 2)
    tracker.image("validation", None, 3)
    tracker.close()
    tracker.close()
    seen = events(tmp_path / "run")
    assert [(one.step, one.value) for one in seen.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    (shown,) = seen.Images("validation")
    assert (shown.step, shown.width, shown.height) == (2, 6, 4)
    assert '"seed": 1' in seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path):
    first = build_tracker("tensorboard", tmp_path, **RUN, resume=False)
    for step in range(1, 8):
        first.log({"loss": step}, step)
    first.close()
    second = build_tracker("tensorboard", tmp_path, **RUN, resume=True, step=4)  # killed after 7, checkpoint at 4
    for step in range(5, 10):
        second.log({"loss": step}, step)
    second.close()
    assert [one.step for one in events(tmp_path).Scalars("loss")] == list(range(1, 10))


def wandb_records(folder):
    """Reads a run's file: 7 bytes of header, then blocks of 32 KiB of records (crc, length, type, bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, last
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(folder):
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, row))
    return rows


def test_wandb_offline_writes_a_run_and_a_resumed_one_has_the_same_id(tmp_path, no_login, picture):
    work_dir = tmp_path / "run"
    tracker = build_tracker("wandb", work_dir, **RUN, resume=False, mode="offline")
    assert tracker.names == ("wandb",)
    tracker.log({"loss": 0.5}, 1)
    tracker.log({"loss": 0.25}, 2)
    tracker.image("validation", picture, 2)
    tracker.close()
    sys.modules["wandb"].teardown()  # as at the end of a process: only then is the file sure to be whole
    (folder,) = (work_dir / "wandb").glob("offline-run-*")
    rows = dict(wandb_history(folder))
    assert (rows[1]["loss"], rows[2]["loss"]) == (0.5, 0.25)
    assert (rows[2]["validation.width"], rows[2]["validation.height"]) == (6, 4)
    runs = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].display_name) == ("tests", "tiny")
    run_id = json.loads((work_dir / "tracker.json").read_text())["wandb"]
    assert runs[0].run_id == run_id

    resumed = build_tracker("wandb", work_dir, **RUN, resume=True, step=2, mode="offline")
    resumed.close()
    assert {path.name.rpartition("-")[2] for path in (work_dir / "wandb").glob("offline-run-*")} == {run_id}


@pytest.fixture
def fake_wandb(monkeypatch, no_login):
    """The real module with `init` replaced by what only notes how it was called."""
    import wandb

    calls = []

    class Run:
        def log(self, values, step):
            raise wandb.Error("the network is gone")

        def finish(self):
            calls.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or Run())
    return calls


def test_a_new_run_has_a_new_id_and_a_resumed_one_the_old(tmp_path, fake_wandb):
    for resume in (False, True, False):
        build_tracker("wandb", tmp_path / "run", **RUN, resume=resume, mode="offline")
    first, second, third = fake_wandb
    assert first["id"] == second["id"] != third["id"]
    assert (first["resume"], second["resume"], first["dir"]) == (None, "allow", str(tmp_path / "run"))
    (tmp_path / "run" / "tracker.json").write_text("{")
    build_tracker("wandb", tmp_path / "run", **RUN, resume=True, mode="offline")
    assert fake_wandb[3]["id"] not in (first["id"], third["id"])


def test_wandb_without_a_login_is_an_error_only_when_it_was_chosen(tmp_path, fake_wandb, caplog):
    with pytest.raises(TrackerError, match="wandb login") as refused:
        build_tracker("wandb", tmp_path / "run", **RUN, resume=False)
    assert "WANDB_MODE=offline" in str(refused.value)
    for report_to, explicit, names in (("wandb", False, ()), ("all", True, ("tensorboard",))):
        caplog.clear()
        tracker = build_tracker(report_to, tmp_path / "run", **RUN, resume=False, explicit=explicit)
        assert tracker.names == names
        tracker.close()
        assert [record.levelname for record in caplog.records if record.name.startswith("sana")] == ["WARNING"]
    assert fake_wandb == []
    assert not (tmp_path / "run" / "tracker.json").exists()


@pytest.mark.parametrize("place", ["key", "netrc", "offline"])
def test_wandb_starts_with_a_login_wherever_it_stands(tmp_path, fake_wandb, no_login, monkeypatch, place):
    if place == "key":
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    elif place == "netrc":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        (no_login / "netrc").write_text(f"machine wandb.example.org login user password {'k' * 40}\n")
        (no_login / "netrc").chmod(0o600)
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
    build_tracker("wandb", tmp_path / "run", **RUN, resume=False)
    assert fake_wandb[0]["project"] == "tests"


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, caplog, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails now
    with pytest.raises(TrackerError, match=f"{name}, which is not installed: pip install"):
        build_tracker(name, tmp_path, **RUN, resume=False)
    assert build_tracker(name, tmp_path, **RUN, resume=False, explicit=False).names == ()
    assert "train_log.jsonl alone" in caplog.text


def test_a_tracker_that_fails_in_the_middle_is_dropped(tmp_path, fake_wandb, caplog):
    tracker = build_tracker("wandb,tensorboard", tmp_path, **RUN, resume=False, mode="offline")
    tracker.log({"loss": 1.0}, 1)
    assert tracker.names == ("tensorboard",)
    assert "the network is gone" in caplog.text
    tracker.log({"loss": 0.5}, 2)
    tracker.close()
    assert [one.step for one in events(tmp_path).Scalars("loss")] == [1, 2]


def test_wandb_that_cannot_start_closes_what_was_started(tmp_path, fake_wandb, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.errors.CommError("timed out")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(TrackerError, match="could not be started: timed out"):
        build_tracker("tensorboard,wandb", tmp_path, **RUN, resume=False, mode="offline")
    assert build_tracker("wandb", tmp_path, **RUN, resume=False, mode="offline", explicit=False).names == ()


def test_a_mode_that_wandb_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match="offline"):
        build_tracker("wandb", tmp_path, **RUN, resume=False, mode="ofline")


def test_other_processes_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tracker = build_tracker("tensorboard", tmp_path / "run", **RUN, resume=False)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert Tracker().names == ()
