"""Runners of the recorded cases of the training kinds: samplers."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from sana.data.aspect_ratio import ASPECT_RATIOS, closest_ratio
from sana.data.batch_sampler import AspectRatioBatchSampler
from sana.data.sample import DataError
from tests.parity.common import Case


def run_aspect_ratio_batch_sampler(case: Case) -> None:
    """The recorded samples are (height, width) or null; those of every third index have the version "others"."""
    table = ASPECT_RATIOS[case.constructor["aspect_ratios"]]
    for run in case.call["runs"]:
        if "ranged_sampler_set_start" in run:
            check_start(run, len(case.call["hw"]))
            continue
        buckets = [
            None if size is None or (run["hq_only"] and index % 3 == 0) else closest_ratio(*size, table)
            for index, size in enumerate(case.call["hw"])
        ]
        options = {"order": "official", "drop_last": run["drop_last"]}
        if not run["batches"]:
            with pytest.raises(DataError):
                AspectRatioBatchSampler(buckets, run["batch_size"], **options)
            continue
        sampler = AspectRatioBatchSampler(buckets, run["batch_size"], **options)
        assert sampler.len_epoch == run["len"]
        assert sampler.batches_per_epoch(0) == len(run["batches"])
        for epoch in range(2):
            assert list(islice(sampler, len(run["batches"]))) == run["batches"]
            assert (sampler.epoch, sampler.batches_left) == (epoch, 0)


def check_start(run: dict[str, Any], length: int) -> None:
    """The official way to resume: the order goes on behind so many samples, and the epoch's length stays."""
    sampler = AspectRatioBatchSampler(["1.0"] * length, 1, order="official")
    state = sampler.state_dict()
    state["cuts"] = [[1, 1, run["ranged_sampler_set_start"]]]
    sampler.load_state_dict(state)
    assert list(islice(sampler, len(run["first"]))) == [[index] for index in run["first"]]
    assert sampler.len_epoch == run["len"]


RUNNERS: dict[str, Callable[[Case], None]] = {"sampler": run_aspect_ratio_batch_sampler}
FUNCTIONS: dict[str, Callable[[Case], None]] = {}
