"""`sana.utils.download`: plain http(s) files from a server on loopback that breaks off, lies and changes its mind."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.utils.hub_server import Hub, ask, running

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
OTHER = bytes(reversed(range(256))) * 4096


@pytest.fixture
def server() -> Iterator[Hub]:
    with running(Hub(plain={"model.pth": WEIGHTS, "login.page": b"<html>sign in</html>"})) as served:
        yield served


def test_a_plain_download_is_resumed_within_one_call(server: Hub, tmp_path: Path) -> None:
    server.cut["model.pth"] = [100_000, 0, 200_000]
    (result,) = ask(server, tmp_path, {"ref": f"{server.url}/files/model.pth"})
    assert Path(result["path"]).read_bytes() == WEIGHTS
    ranges = [headers.get("range") for headers in server.gets("model.pth")]
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]


def test_a_plain_download_is_resumed_by_the_next_process(server: Hub, tmp_path: Path) -> None:
    url = f"{server.url}/files/model.pth"
    server.cut["model.pth"] = [100_000, 0, 0, 0, 0, 0]
    (broken,) = ask(server, tmp_path, {"ref": url})
    assert "5 attempts without a new byte" in broken["error"]
    assert [path.name for path in tmp_path.rglob("model.pth*") if path.suffix == ".pth"] == []
    (result,) = ask(server, tmp_path, {"ref": url})
    assert Path(result["path"]).read_bytes() == WEIGHTS
    assert server.gets("model.pth")[-1]["range"] == "bytes=100000-"


def test_a_changed_file_is_fetched_afresh(server: Hub, tmp_path: Path) -> None:
    url = f"{server.url}/files/model.pth"
    server.cut["model.pth"] = [100_000, 0, 0, 0, 0, 0]
    ask(server, tmp_path, {"ref": url})
    server.plain["model.pth"] = OTHER
    (result,) = ask(server, tmp_path, {"ref": url})
    assert Path(result["path"]).read_bytes() == OTHER


def test_a_server_without_ranges_starts_again(server: Hub, tmp_path: Path) -> None:
    server.no_range = True
    server.cut["model.pth"] = [100_000]
    (result,) = ask(server, tmp_path, {"ref": f"{server.url}/files/model.pth"})
    assert Path(result["path"]).read_bytes() == WEIGHTS


def test_plain_failures_are_sentences(server: Hub, tmp_path: Path) -> None:
    good, bad = hashlib.sha256(WEIGHTS).hexdigest(), "0" * 64
    missing, page, wrong, right, folder = ask(
        server,
        tmp_path,
        {"ref": f"{server.url}/files/nothing.pth"},
        {"ref": f"{server.url}/files/login.page"},
        {"ref": f"{server.url}/files/model.pth#sha256={bad}"},
        {"ref": f"{server.url}/files/model.pth#sha256={good}"},
        {"ref": f"{server.url}/files", "kind": "folder"},
    )
    assert missing["error"].endswith("there is no such file (status 404).")
    assert "sent a web page" in page["error"]
    assert f"not {bad} as asked" in wrong["error"]
    assert Path(right["path"]).read_bytes() == WEIGHTS
    assert "is a web address, and a folder is needed" in folder["error"]
    cached, absent = ask(
        server,
        tmp_path,
        {"ref": f"{server.url}/files/model.pth"},
        {"ref": f"{server.url}/files/other.pth"},
        HF_HUB_OFFLINE="1",
    )
    assert Path(cached["path"]).read_bytes() == WEIGHTS
    assert "HF_HUB_OFFLINE is set" in absent["error"]
