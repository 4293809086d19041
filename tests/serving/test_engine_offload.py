"""Offload under the engine: the pictures of the offline pipeline, bit for bit, and nothing stays where it was."""

import gc
import math

import pytest
import torch

from sana.models.layers.residency import slots_below
from sana.ops import packing
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving.engine import Engine
from sana.serving.job import CancelledError, JobOptions
from tests.pipelines.offloaded import KINDS, put_away
from tests.tiny_model import make_model_folder

WAIT = 120
REQUESTS = [
    Request("a cat", 64, 64, num_inference_steps=4, seed=1, progress_bar=False),
    Request("two dogs by the sea", 128, 64, num_inference_steps=3, seed=2, pag_scale=2.0, progress_bar=False),
    Request("a red circle", 64, 64, num_inference_steps=2, seed=3, guidance_scale=1.0, progress_bar=False),
    Request("a cat", 64, 128, num_inference_steps=3, seed=4, negative_prompt="green", progress_bar=False),
]


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    monkeypatch.setattr(packing, "pack_budget", lambda: 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "offloaded")


@pytest.fixture(scope="module")
def expected(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack_budget", lambda: 0)
        plain = SanaPipeline.from_pretrained(folder, device="cpu")
        return [plain.generate(request) for request in REQUESTS]


def bytes_of(network: torch.nn.Module) -> int:
    return sum(one.nbytes for one in (*network.parameters(), *network.buffers()))


def assert_away(pipeline: SanaPipeline, mover) -> None:
    gc.collect()
    assert mover.resident == 0
    for network in (pipeline.transformer, pipeline._text_encoder, pipeline._autoencoder):
        assert not any(slot.resident for slot in slots_below(network))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_interleaved_pictures_are_the_offline_ones_and_no_two_networks_are_there_at_a_time(folder, expected, kind):
    """Requests of mixed sizes join during the steps of others, so that every stage follows every other."""
    pipeline = SanaPipeline.from_pretrained(folder, device="cpu")
    networks = (pipeline.transformer, pipeline.text_encoder.model, pipeline.autoencoder)
    largest, everything = max(map(bytes_of, networks)), sum(map(bytes_of, networks))
    mover = None if kind == "none" else put_away(pipeline, kind)
    jobs, seen = {}, []
    with Engine(pipeline, max_active=3) as engine:

        def after(step):
            seen.append((engine.stats().active, math.inf if mover is None else mover.resident))
            if len(jobs) < len(REQUESTS):
                index = len(jobs)
                jobs[index] = None  # before `submit`: another step may come first
                (jobs[index],) = engine.submit([REQUESTS[index]], [JobOptions(on_step=after, previews=1)])

        jobs[0] = None
        (jobs[0],) = engine.submit([REQUESTS[0]], [JobOptions(on_step=after, previews=1)])
        found = []
        for index in range(len(REQUESTS)):
            while jobs.get(index) is None:
                assert engine.alive
            found.append(jobs[index].future.result(WAIT))
        assert max(active for active, _ in seen) == 3, "the pictures never had company"
    for image, offline in zip(found, expected, strict=True):
        assert torch.equal(image, offline)
    if mover is not None:
        assert all(resident == 0 for _, resident in seen), "a network stayed between the steps"
        assert 0 < mover.peak <= largest < everything
        assert_away(pipeline, mover)


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_after_a_cancelled_picture_everything_is_away_and_the_next_one_is_right(folder, expected, kind):
    pipeline = SanaPipeline.from_pretrained(folder, device="cpu")
    _ = pipeline.text_encoder, pipeline.autoencoder
    mover = put_away(pipeline, kind)
    with Engine(pipeline, max_active=2) as engine:
        victims = []

        def after(step):
            if step.done == 2:
                engine.cancel(victims)

        long = Request("a cat", 64, 64, num_inference_steps=50, seed=9, progress_bar=False)
        victims += engine.submit([long], [JobOptions(on_step=after)])
        with pytest.raises(CancelledError):
            victims[0].future.result(WAIT)
        (job,) = engine.submit([REQUESTS[1]])
        assert torch.equal(job.future.result(WAIT), expected[1])
    assert_away(pipeline, mover)
