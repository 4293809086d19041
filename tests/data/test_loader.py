"""Batches in an exact order, whoever reads them and whenever the run stopped; broken samples; processes that die."""

import gc
import json
import logging
import multiprocessing
import os
import random
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sana.data.loader import TrainingLoader, sample_rng
from sana.data.sample import BrokenSampleError, DataError, Sample

SIDES = {"1.0": (2, 2), "0.5": (2, 4)}
MAIN = os.getpid()


class Numbers:
    """Images that hold their index and a drawn number. `trouble` maps an index to what happens when it is read."""

    def __init__(self, buckets=("1.0", "0.5", "1.0", "1.0", "0.5", "1.0", "1.0"), trouble=None) -> None:
        self._buckets, self.trouble = list(buckets), trouble or {}

    def __len__(self) -> int:
        return len(self._buckets)

    def key(self, index: int) -> str:
        return f"sample {index}"

    def buckets(self) -> list[str]:
        return self._buckets

    def fingerprint(self) -> str:
        return str(len(self))

    def load(self, index: int, rng: random.Random) -> Sample:
        if index in self.trouble:
            self.trouble[index](self.key(index))
        image = torch.full((3, *SIDES[self._buckets[index]]), float(index))
        return Sample(self.key(index), f"{index} {rng.random()} in {os.getpid()}", image=image)


def broken(key: str) -> None:
    raise BrokenSampleError(key, "cut short")


def unusable(key: str) -> None:
    raise DataError("The disk is gone: mount it.")


def mistake(key: str) -> None:
    raise ZeroDivisionError("a mistake in the code")


def killed(key: str) -> None:
    if os.getpid() != MAIN:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def make():
    """TrainingLoader whose processes end with the test."""
    loaders = []

    def build(dataset=None, batch_size=2, **options) -> TrainingLoader:
        loaders.append(TrainingLoader(dataset or Numbers(), batch_size, **options))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def content(batch) -> tuple:
    captions = [caption.split(" in ")[0] for caption in batch.captions]
    return batch.keys, captions, batch.images.tolist(), batch.weights.tolist(), batch.epoch


def take(loader, count) -> list[tuple]:
    return [content(batch) for batch in islice(loader, count)]


def worker_pids(loader) -> set[int]:
    return {int(loader.next_batch().captions[0].split()[-1]) for _ in range(8)}


def test_any_number_of_workers_gives_the_same_batches(make) -> None:
    options = {"seed": 5, "remainder": "carry"}
    alone = take(make(**options), 16)
    assert take(make(num_workers=1, prefetch=1, **options), 16) == alone
    assert take(make(num_workers=2, prefetch=3, **options), 16) == alone
    draws = {(each[-1], *pair) for each in alone for pair in zip(each[0], each[1], strict=True)}
    assert alone[-1][-1] >= 3 and len({caption for *_, caption in draws}) == len(draws)  # every epoch draws anew


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    drawn = {sample_rng(*key).random() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11))}
    assert len(drawn) == 6
    assert sample_rng(3, 1, 2).random() == 0.8000929567542818  # running trainings depend on it


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_is_that_of_the_batches_handed_out(make, workers) -> None:
    expected = take(make(seed=1), 20)
    reading_ahead = make(seed=1, num_workers=workers)
    plain = make(seed=1)
    states = []
    for _ in range(11):
        assert reading_ahead.state_dict() == plain.state_dict()
        assert (reading_ahead.epoch, reading_ahead.batches_left) == (plain.epoch, plain.batches_left)
        states.append(json.loads(json.dumps(reading_ahead.state_dict())))
        reading_ahead.next_batch()
        plain.next_batch()
    for stop in (0, 3, 4, 9):
        reading_ahead.load_state_dict(states[stop])  # processes were reading elsewhere
        assert reading_ahead.state_dict() == states[stop]
        assert take(reading_ahead, 6) == expected[stop : stop + 6]


def test_closing_ends_the_processes_and_keeps_the_position(make) -> None:
    expected = take(make(), 10)
    before = set(multiprocessing.active_children())
    loader = make(num_workers=2)
    assert take(loader, 5) == expected[:5]
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    assert take(loader, 5) == expected[5:]


def test_a_forgotten_loader_ends_its_processes() -> None:
    before = set(multiprocessing.active_children())
    loader = TrainingLoader(Numbers(), 2, num_workers=1)
    loader.next_batch()
    assert set(multiprocessing.active_children()) - before
    del loader
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def test_global_random_states_are_left_alone(make) -> None:
    def states() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    take(make(num_workers=1), 3)
    take(make(), 3)
    assert states() == before


def test_lengths_and_epochs(make) -> None:
    loader = make(Numbers(["1.0"] * 5), world_size=2)  # 3 batches, 2 rounds
    assert (loader.len_epoch, loader.batches_left, loader.epoch) == (2, 2, 0)
    epochs = [(loader.next_batch().epoch, loader.epoch, loader.batches_left) for _ in range(3)]
    assert epochs == [(0, 0, 1), (0, 0, 0), (1, 1, 1)]


def test_two_ranks_go_on_as_one(make) -> None:
    """Within the epoch nothing is repeated or lost."""
    ranks = [make(Numbers(["1.0"] * 24), rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0].fingerprint == ranks[1].fingerprint != make(Numbers(["1.0"] * 23)).fingerprint
    seen = [key for rank in ranks for each in take(rank, 2) for key in each[0]]
    assert ranks[0].state_dict()["sampler"] == ranks[1].state_dict()["sampler"]
    one = make(Numbers(["1.0"] * 24), 4)
    one.load_state_dict(ranks[1].state_dict())
    assert one.batches_left == 4
    seen += [key for each in take(one, 4) for key in each[0]]
    assert one.epoch == 0 and sorted(seen) == sorted(f"sample {index}" for index in range(24))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_has_no_weight_and_is_told_once(make, caplog, workers) -> None:
    dataset = Numbers(["1.0"] * 4, {1: broken})
    loader = make(dataset, 4, order="sequential", num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = [loader.next_batch() for _ in range(3)]
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == [0, 0, 2, 3] and batch.weights.tolist() == [1, 0, 1, 1]
        assert batch.keys == [f"sample {index}" for index in range(4)] and batch.captions[1] == batch.captions[0]
    assert [record.getMessage() for record in caplog.records] == [
        "Broken sample sample 1 is left out: cut short (1; at most 100 are)"
    ]
    assert loader.state_dict()["broken"] == ["sample 1"]
    caplog.clear()
    resumed = make(dataset, 4, order="sequential")
    resumed.load_state_dict(loader.state_dict())
    assert content(resumed.next_batch()) == content(loader.next_batch()) and not caplog.records


def test_a_batch_without_a_good_sample_keeps_the_ranks_in_step(make) -> None:
    dataset = Numbers(["1.0", "1.0", "0.5", "1.0", "1.0", "1.0"], {0: broken, 1: broken, 2: broken, 3: broken})
    loader = make(dataset, 2, order="sequential")
    batches = [loader.next_batch() for _ in range(3)]
    assert [batch.keys for batch in batches] == [
        ["sample 0", "sample 1"], ["sample 3", "sample 4"], ["sample 2", "sample 2"],
    ]  # fmt: skip
    assert [batch.weights.tolist() for batch in batches[1:]] == [[0, 1], [0, 0]]
    assert batches[0].weights.tolist() == [0, 0] and (batches[0].images == 4).all()  # next good one of the bucket
    assert (batches[2].images == 4).all()  # its bucket has none
    assert batches[2].images.shape == (2, 3, 2, 2)
    assert loader.state_dict()["broken"] == [f"sample {index}" for index in range(4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_budget_of_broken_samples(make, workers) -> None:
    dataset = Numbers(["1.0"] * 6, {1: broken, 2: broken, 5: broken})
    enough = make(dataset, 2, order="sequential", broken_budget=3, num_workers=workers)
    assert len(take(enough, 9)) == 9
    short = make(dataset, 2, order="sequential", broken_budget=2, num_workers=workers)
    take(short, 2)
    with pytest.raises(DataError, match=r"3 samples are broken.*=2: sample 1, sample 2, sample 5\. Repair"):
        short.next_batch()
    short.load_state_dict({**enough.state_dict(), "broken": ["sample 1", "sample 2"]})
    assert short.state_dict()["broken"] == ["sample 1", "sample 2"]


@pytest.mark.parametrize("budget", [3, 100])
def test_nothing_can_be_read(make, budget) -> None:
    loader = make(Numbers(trouble=dict.fromkeys(range(7), broken)), broken_budget=budget)
    with pytest.raises(DataError, match="4 samples are broken" if budget == 3 else "No sample can be read"):
        loader.next_batch()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_data_set(make, workers) -> None:
    loader = make(Numbers(trouble=dict.fromkeys(range(7), unusable)), num_workers=workers)
    with pytest.raises(DataError) as caught:
        loader.next_batch()
    assert str(caught.value) == "The disk is gone: mount it."
    loader = make(Numbers(trouble=dict.fromkeys(range(7), mistake)), num_workers=workers)
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError, match="a mistake in the code"):
        loader.next_batch()
    assert set(multiprocessing.active_children()) <= before  # though the error is still at hand


def test_a_killed_process_is_an_error_not_a_hang(make, monkeypatch) -> None:
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # looks every 5 s else
    handler = signal.getsignal(signal.SIGCHLD)
    dataset = Numbers(["1.0"] * 8, {7: killed})
    loader = make(dataset, 2, order="sequential", num_workers=2)
    keys = []
    with pytest.raises(DataError, match="died.*use fewer workers"):
        keys.extend(loader.next_batch().keys for _ in range(4))
    handed_out = loader.state_dict()["sampler"]["cuts"][-1][2]  # what it had read may have died with it
    assert handed_out <= 3
    assert signal.getsignal(signal.SIGCHLD) is handler
    dataset.trouble.clear()  # memory is there again
    keys.extend(loader.next_batch().keys for _ in range(4 - handed_out))
    assert keys == [[f"sample {2 * batch}", f"sample {2 * batch + 1}"] for batch in range(4)]


def test_signals_to_the_process_group_leave_the_readers_alone(make) -> None:
    expected = take(make(), 30)
    loader = make(num_workers=2)
    got = take(loader, 6)
    pids = worker_pids(loader)
    assert len(pids) == 2 and MAIN not in pids
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert got + take(loader, 10) == expected[:6] + expected[14:24]
    assert worker_pids(loader) == pids


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_reach_the_device(make, workers) -> None:
    batch = make(num_workers=workers, pin_memory=True).next_batch()
    assert batch.images.is_pinned() and batch.weights.is_pinned()
    assert torch.equal(batch.to("cuda").images.cpu(), batch.images)


@pytest.mark.parametrize(
    "state", [{}, {"sampler": {}, "broken": []}, {"sampler": {}}, {"sampler": 3, "broken": []}, None]
)
def test_a_damaged_state_is_refused(make, state) -> None:
    with pytest.raises(DataError, match="damaged|does not fit"):
        make().load_state_dict(state)


@pytest.mark.parametrize("wrong", [{"num_workers": -1}, {"prefetch": 0}, {"broken_budget": -1}, {"batch_size": 0}])
def test_impossible_arguments(make, wrong) -> None:
    with pytest.raises(ValueError):
        make(**wrong)
