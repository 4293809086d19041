"""Compiled code on disk: what is read, when a file is written, and that a damaged one does no harm."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from sana.pipelines.compile_cache import SUFFIX, CompileCache


@pytest.fixture
def artifacts(monkeypatch):
    """A stand-in for torch's artifacts: what was loaded, and what there is to save."""
    state = {"saved": b"one", "loaded": []}

    def load(content):
        state["loaded"].append(content)
        return None if content == b"damaged" else object()

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: state["saved"] and (state["saved"], None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    counters["inductor"]["fxgraph_cache_miss"] = 0
    yield state
    counters["inductor"]["fxgraph_cache_miss"] = 0


def test_a_file_is_written_only_after_something_was_compiled(artifacts, tmp_path):
    cache = CompileCache(tmp_path / "new")
    assert cache.store() is None and not (tmp_path / "new").exists()
    counters["inductor"]["fxgraph_cache_miss"] += 2
    first = cache.store()
    assert first is not None and first.read_bytes() == b"one"
    assert cache.store() is None
    counters["inductor"]["fxgraph_cache_miss"] += 1
    artifacts["saved"] = b"one and two"
    assert cache.store() == first and first.read_bytes() == b"one and two"
    assert [file.name for file in (tmp_path / "new").iterdir()] == [first.name]


def test_another_process_reads_every_file_and_writes_its_own(artifacts, tmp_path):
    for content in (b"one", b"two"):
        artifacts["saved"] = content
        counters["inductor"]["fxgraph_cache_miss"] += 1
        assert CompileCache(tmp_path).store() is not None
    assert CompileCache(tmp_path).load() == 2
    assert sorted(artifacts["loaded"]) == [b"one", b"two"]


def test_files_of_another_torch_are_left_alone(artifacts, tmp_path):
    (tmp_path / f"sana-torch0.1-abc{SUFFIX}").write_bytes(b"old")
    assert CompileCache(tmp_path).load() == 0 and not artifacts["loaded"]


def test_a_damaged_file_is_named_and_not_used(artifacts, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "sana")
    name = f"sana-torch{torch.__version__}-abc{SUFFIX}"
    (tmp_path / name).write_bytes(b"damaged")
    assert CompileCache(tmp_path).load() == 0
    assert name in caplog.text and "delete it" in caplog.text


def test_a_backend_without_artifacts_writes_nothing(artifacts, tmp_path):
    artifacts["saved"] = None
    counters["inductor"]["fxgraph_cache_miss"] += 1
    assert CompileCache(tmp_path / "new").store() is None and not (tmp_path / "new").exists()


def test_no_folder_no_files(artifacts):
    counters["inductor"]["fxgraph_cache_miss"] += 1
    assert CompileCache(None).load() == 0 and CompileCache(None).store() is None


def test_torch_itself_refuses_a_damaged_file(tmp_path, caplog):
    (tmp_path / f"sana-torch{torch.__version__}-abc{SUFFIX}").write_bytes(b"\x01\x02\x03")
    assert CompileCache(tmp_path).load() == 0


@pytest.mark.slow
def test_a_new_process_finds_what_was_compiled(tmp_path, monkeypatch):
    from torch._inductor.utils import fresh_cache

    def square(x):
        return (x * x).sin().sum(1)

    x = torch.randn(4, 5)
    torch._dynamo.reset()
    with fresh_cache():
        cache = CompileCache(tmp_path)
        assert torch.allclose(torch.compile(square)(x), square(x))
        assert cache.store() is not None
    torch._dynamo.reset()
    before = counters["inductor"]["fxgraph_cache_miss"]
    with fresh_cache():
        assert CompileCache(tmp_path).load() == 1
        assert torch.allclose(torch.compile(square)(x), square(x))
        assert counters["inductor"]["fxgraph_cache_miss"] == before
    torch._dynamo.reset()
