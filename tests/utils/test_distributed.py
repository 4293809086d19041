"""Rank and sharing, from the environment and from a real process group."""

import pytest
import torch.distributed as dist

from sana.utils import distributed


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.is_main_process()
    distributed.barrier()


def test_the_environment_is_read_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (3, 1, 4)
    assert distributed.main_process_only(lambda: "done")() is None
    monkeypatch.setenv("RANK", "0")
    assert distributed.main_process_only(lambda: "done")() == "done"


def test_shares_are_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(11))
    monkeypatch.setenv("WORLD_SIZE", "4")
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(distributed.share(items))
    assert sorted(item for share in shares for item in share) == items
    assert {len(share) for share in shares} == {2, 3}


def test_a_process_group_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "9")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        distributed.barrier()
    finally:
        dist.destroy_process_group()
