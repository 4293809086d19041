"""`sana.utils.hub`: what a reference means, and real downloads by huggingface_hub from a small hub on loopback."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana.utils import hub
from tests.utils.hub_server import COMMIT, Hub, ask, running

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
OTHER = bytes(reversed(range(256))) * 16


@pytest.fixture
def server() -> Iterator[Hub]:
    content = Hub(
        repos={
            "owner/model": {"checkpoints/model.pth": WEIGHTS, "config.json": b"{}", "sub/notes.txt": b"short"},
            "owner/gated": {"model.pth": OTHER},
            "owner/folder": {
                "model_index.json": b'{"_class_name": "SanaPipeline"}',
                "transformer/config.json": b"{}",
                "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
                "transformer/diffusion_pytorch_model.bf16.safetensors": OTHER,
            },
        },
        gated={"owner/gated"},
    )
    with running(content) as served:
        yield served


# What a reference means


def test_a_local_path_is_returned_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"x")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(tmp_path, kind="folder") == tmp_path
    assert hub.resolve(tmp_path, kind="any") == tmp_path
    with pytest.raises(hub.FetchError, match="is a folder where a file is needed"):
        hub.resolve(tmp_path)
    with pytest.raises(hub.FetchError, match="is a file where a folder is needed"):
        hub.resolve(file, kind="folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://a/b/c/d.pth", hub.HubReference("a/b", "c/d.pth")),
        ("hf://a/b", hub.HubReference("a/b")),
        ("hf://a/b@v1.0/d.pth", hub.HubReference("a/b", "d.pth", "v1.0")),
        ("a/b", hub.HubReference("a/b")),
        ("a/b@main", hub.HubReference("a/b", "", "main")),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("https://huggingface.co/a/b/resolve/main/c/d.pth", hub.HubReference("a/b", "c/d.pth")),
        ("https://huggingface.co/a/b/blob/v2/d.pth?download=true", hub.HubReference("a/b", "d.pth", "v2")),
        ("https://example.org/a/b/resolve/main/d.pth", None),
    ],
)
def test_hub_references_are_read(text: str, expected: hub.HubReference | None) -> None:
    assert hub.parse_hub_reference(text) == expected


@pytest.mark.parametrize("text", ["hf://a", "hf://", "hf://a//b", "hf://a/../b/c"])
def test_a_broken_hub_reference_is_one_sentence(text: str) -> None:
    with pytest.raises(hub.FetchError, match="is no hub reference") as caught:
        hub.resolve(text)
    assert "\n" not in str(caught.value)


def test_a_missing_path_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hub.FetchError, match=r"^no/such/file\.pth does not exist .*hf://owner/repository/path"):
        hub.resolve("no/such/file.pth")
    with pytest.raises(hub.FetchError, match="empty reference"):
        hub.resolve("  ")
    with pytest.raises(hub.FetchError, match="for a file give hf://a/b/path/to/file"):
        hub.resolve("a/b", kind="file")


FILES = [
    "model_index.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.bf16.safetensors",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model.bf16-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.bf16.json",
    "vae/diffusion_pytorch_model.safetensors",
    "extra/model.fp16.safetensors",
]


def test_variants_are_chosen_folder_by_folder() -> None:
    default = [file for file in FILES if "bf16" not in file]
    assert hub.select_variant(FILES, None) == default  # `extra` has nothing else than fp16
    bf16 = [FILES[0], FILES[2], FILES[6], FILES[7], FILES[8], FILES[9]]
    assert hub.select_variant(FILES, "bf16") == bf16  # the vae has no bf16 and keeps its default


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.bf16.safetensors", "config.json"], "bf16"),
        (["model.bf16-00001-of-00002.safetensors", "model.safetensors.index.bf16.json"], "bf16"),
        (["model.bf16.safetensors", "model.safetensors"], None),
        (["model-00001-of-00002.safetensors"], None),
        (["config.json"], None),
    ],
)
def test_the_only_variant_of_a_folder(tmp_path: Path, names: list[str], expected: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert hub.only_variant(tmp_path) == expected


# Downloads by the real client


def test_files_and_folders_of_the_hub_arrive_whole(server: Hub, tmp_path: Path) -> None:
    file, folder, subfolder, link = ask(
        server,
        tmp_path,
        {"ref": "hf://owner/model/checkpoints/model.pth"},
        {"ref": "owner/folder", "kind": "folder", "variant": "bf16"},
        {"ref": "hf://owner/model/sub", "kind": "folder"},
        {"ref": f"{server.url}/owner/model/resolve/main/config.json"},
    )
    assert Path(file["path"]).read_bytes() == WEIGHTS
    assert Path(file["path"]).is_relative_to(tmp_path)  # HF_HOME
    root = Path(folder["path"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert names == [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.bf16.safetensors",
    ]
    assert (Path(subfolder["path"]) / "notes.txt").read_bytes() == b"short"
    assert Path(link["path"]).read_bytes() == b"{}"


def test_a_broken_download_is_resumed(server: Hub, tmp_path: Path) -> None:
    large = WEIGHTS * 12  # the client keeps what it got in pieces of 10 MiB
    server.repos["owner/model"]["large.pth"] = large
    server.cut["large.pth"] = [11 * 2**20]
    (result,) = ask(server, tmp_path, {"ref": "hf://owner/model/large.pth"})
    assert Path(result["path"]).read_bytes() == large
    ranges = [headers.get("range") for headers in server.gets("large.pth")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_a_wrong_hash_is_reported_and_the_file_removed(server: Hub, tmp_path: Path) -> None:
    true = hashlib.sha256(WEIGHTS).hexdigest()
    server.promised["checkpoints/model.pth"] = "0" * 64
    server.promised["config.json"] = "1" * 40
    large, small = ask(
        server, tmp_path, {"ref": "hf://owner/model/checkpoints/model.pth"}, {"ref": "hf://owner/model/config.json"}
    )
    assert f"arrived damaged: its hash is {true} and the hub promised {'0' * 64}" in large["error"]
    assert "arrived damaged" in small["error"]
    left = [path for path in (tmp_path / "hub").rglob("*") if path.name in ("0" * 64, "1" * 40, "model.pth")]
    assert left == []
    server.promised.clear()
    (again,) = ask(server, tmp_path, {"ref": "hf://owner/model/checkpoints/model.pth"})
    assert Path(again["path"]).read_bytes() == WEIGHTS


def test_a_damaged_file_in_the_cache_is_found(server: Hub, tmp_path: Path) -> None:
    (first,) = ask(server, tmp_path, {"ref": "hf://owner/model/checkpoints/model.pth"})
    blob = Path(first["path"]).resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"!")
    (second,) = ask(server, tmp_path, {"ref": "hf://owner/model/checkpoints/model.pth"}, HF_HUB_OFFLINE="1")
    assert "arrived damaged" in second["error"]


def test_gated_repositories_need_the_token(server: Hub, tmp_path: Path) -> None:
    task = {"ref": "hf://owner/gated/model.pth"}
    (refused,) = ask(server, tmp_path, task)
    assert "the repository is gated" in refused["error"]
    assert f"{server.url}/owner/gated" in refused["error"]
    assert "HF_TOKEN" in refused["error"]
    (given,) = ask(server, tmp_path, task, HF_TOKEN="hf_secret")
    assert Path(given["path"]).read_bytes() == OTHER
    assert all(headers["authorization"] == "Bearer hf_secret" for headers in server.gets("model.pth"))


def test_what_is_not_there_is_named(server: Hub, tmp_path: Path) -> None:
    no_file, no_repo, no_revision, no_folder = ask(
        server,
        tmp_path,
        {"ref": "hf://owner/model/nothing.pth"},
        {"ref": "hf://owner/absent/model.pth"},
        {"ref": f"hf://owner/model@{'v9'}/config.json"},
        {"ref": "hf://owner/model/absent", "kind": "folder"},
    )
    assert no_file["error"] == "Could not fetch hf://owner/model/nothing.pth: the repository has no file 'nothing.pth'."
    assert "no such repository, or it is private" in no_repo["error"]
    assert "no revision 'v9'" in no_revision["error"]
    assert "is no folder of the repository" in no_folder["error"]
    assert all("\n" not in result["error"] for result in (no_file, no_repo, no_revision, no_folder))


def test_offline_takes_the_cache_and_says_what_is_missing(server: Hub, tmp_path: Path) -> None:
    file = {"ref": "hf://owner/model/checkpoints/model.pth"}
    folder = {"ref": "owner/folder", "kind": "folder", "variant": "bf16"}
    (missing,) = ask(server, tmp_path, file, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in missing["error"]
    assert server.log == []
    online = ask(server, tmp_path, file, folder)
    asked = len(server.log)
    assert ask(server, tmp_path, file, folder, HF_HUB_OFFLINE="1") == online
    assert len(server.log) == asked


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    with running(Hub()) as closed:
        pass
    (result,) = ask(closed, tmp_path, {"ref": f"hf://owner/model@{COMMIT}/config.json"})
    assert f"{closed.url} could not be reached" in result["error"]
    assert "\n" not in result["error"]


def test_settings_are_those_of_the_client_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    settings = hub.hub_settings()
    assert (settings["cache"], settings["offline"], settings["token"]) == (constants.HF_HUB_CACHE, True, True)
    assert "hf_something" not in str(settings)
