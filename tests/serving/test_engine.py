"""The engine: pictures with the bits of the offline pipeline, whoever comes and goes meanwhile."""

import gc
import random
import threading
import time

import pytest
import torch

from sana.models.transformer.sana import SanaMS
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving import engine as engine_module
from sana.serving.coroutine import Coroutine
from sana.serving.engine import Engine, QueueFullError
from sana.serving.evaluation import BrokenDeviceError
from sana.serving.job import CancelledError, HandedBackError, JobOptions
from sana.serving.stepping import SteppedPipeline

WAIT = 120  # seconds after which a lost request fails a test instead of hanging it
SIZES = ((64, 64), (128, 64), (64, 128), (100, 90))  # the last is no multiple of 32: a trained shape, cut to size
PROMPTS = ("a red circle", "two blue squares and a green star above a dog", "a cat")


def any_request(rng: random.Random, **fixed) -> Request:
    height, width = rng.choice(SIZES)
    options = {
        "prompt": rng.choice(PROMPTS), "height": height, "width": width, "seed": rng.randrange(10**6),
        "num_inference_steps": rng.randint(1, 4), "guidance_scale": rng.choice([1.0, 4.5, 7.0]),
        "negative_prompt": rng.choice([None, "green"]), "pag_scale": rng.choice([None, 2.0]),
        "sampler": rng.choice([None, "flow_euler"]), "interval_guidance": rng.choice([(0.0, 1.0), (0.3, 0.9)]),
        "output_type": "pt", "use_resolution_binning": height == 100,
    }  # fmt: skip
    return Request(**{**options, **fixed})


def quick(**fixed) -> Request:
    return Request(**{"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 1, **fixed})


def test_pictures_are_the_offline_ones_to_the_bit_when_requests_join_at_random_steps(bundled):
    """Mixed sizes, steps, guidance and samplers; each arrives during a random step of an earlier one."""
    rng = random.Random(7)
    requests = [any_request(rng) for _ in range(24)]
    expected = [bundled.generate(request) for request in requests]
    waiting, jobs, active = list(enumerate(requests)), {}, []

    with Engine(bundled, max_active=5) as engine:

        def arrive(_=None):
            active.append(engine.stats().active)
            while waiting and (rng.random() < 0.5 or engine.stats().active + engine.stats().queued < 2):
                index, request = waiting.pop(0)
                (jobs[index],) = engine.submit([request], [JobOptions(on_step=arrive)])

        arrive()
        done = [jobs[index].future.result(WAIT) for index in range(len(requests))]
        stats = engine.stats()
    for image, offline in zip(done, expected, strict=True):
        assert torch.equal(image, offline)
    assert max(active) == 5, "the test never had company"
    assert (stats.images, stats.queued, stats.active, stats.failed) == (24, 0, 0, 0)
    assert stats.steps == sum(request.num_inference_steps for request in requests) == stats.forwards


def test_images_of_a_prompt_are_the_offline_batch(bundled):
    offline = bundled("a red circle", height=64, width=64, num_inference_steps=2, seed=5, num_images_per_prompt=3)
    requests = [Request("a red circle", 64, 64, num_inference_steps=2, seed=5 + index) for index in range(3)]
    with Engine(bundled) as engine:
        done = [job.future.result(WAIT) for job in engine.submit(requests)]
    assert torch.equal(torch.cat(done), offline)


def test_a_request_joins_between_the_steps_of_another_and_leaves_before_it(small):
    told = []
    with Engine(small, max_active=2) as engine:

        def first(step):
            told.append(("first", step.done))
            if step.done == 2:
                late.extend(engine.submit([quick(num_inference_steps=2)], [JobOptions(on_step=second)]))

        def second(step):
            told.append(("second", step.done))

        late = []
        (job,) = engine.submit([quick(num_inference_steps=6)], [JobOptions(on_step=first)])
        job.future.result(WAIT)
        late[0].future.result(WAIT)
    assert told == [("first", 1), ("first", 2), ("first", 3), ("second", 1), ("first", 4), ("second", 2),
                    ("first", 5), ("first", 6)]  # fmt: skip


def test_cancelling_takes_effect_between_steps_and_hurts_nobody(small):
    expected = small.generate(quick(num_inference_steps=5))
    told = []
    with Engine(small, max_active=2) as engine:

        def after(step):
            told.append(step.done)
            if step.done == 2:
                engine.cancel([victim])

        victim, other = engine.submit(
            [quick(num_inference_steps=50), quick(num_inference_steps=5)], [JobOptions(on_step=after), JobOptions()]
        )
        with pytest.raises(CancelledError):
            victim.future.result(WAIT)
        assert torch.equal(other.future.result(WAIT), expected)
        stats = engine.stats()
    assert told == [1, 2]
    assert (stats.cancelled, stats.images, stats.active) == (1, 1, 0)


def test_one_that_waits_is_cancelled_at_once(small):
    with Engine(small, max_active=1) as engine:
        kept = []

        def after(step):
            if step.done == 1:
                engine.cancel(kept[1:])
                assert kept[1].future.done()

        kept += engine.submit([quick(num_inference_steps=3), quick()], [JobOptions(on_step=after), JobOptions()])
        kept[0].future.result(WAIT)
        with pytest.raises(CancelledError):
            kept[1].future.result(WAIT)


def test_an_error_of_one_request_is_its_own(small, monkeypatch):
    """Not-finite latents in one, an exception out of the progress callback in another; the third is untouched."""
    expected = small.generate(quick(num_inference_steps=4))
    broken = torch.full((1, small.autoencoder.latent_channels, 2, 2), 1e30)

    def boom(step):
        raise RuntimeError("boom")

    with Engine(small) as engine:
        infinite, raising, healthy = engine.submit(
            [quick(latents=broken, seed=None, num_inference_steps=4), quick(), quick(num_inference_steps=4)],
            [JobOptions(), JobOptions(on_step=boom), JobOptions()],
        )
        with pytest.raises(NonFiniteError):
            infinite.future.result(WAIT)
        with pytest.raises(RuntimeError, match="boom"):
            raising.future.result(WAIT)
        assert torch.equal(healthy.future.result(WAIT), expected)
        assert engine.alive and engine.stats().failed == 2


def test_the_queue_is_bounded_and_takes_all_of_a_submission_or_nothing(small):
    with Engine(small, max_active=1, max_queue=2) as engine:
        seen = []

        def after(step):
            if step.done != 1:
                return
            jobs.extend(engine.submit([quick()]))
            with pytest.raises(QueueFullError) as full:
                engine.submit([quick(), quick()])
            jobs.extend(engine.submit([quick()]))
            seen.append((full.value.retry_after, engine.stats().queued))

        jobs = []
        (first,) = engine.submit([quick(num_inference_steps=3)], [JobOptions(on_step=after)])
        for job in [first, *jobs]:
            job.future.result(WAIT)
        while not engine.idle:
            assert engine.alive
        stats = engine.stats()
    assert seen[0][0] >= 1 and seen[0][1] == 2
    assert (stats.images, stats.rejected) == (3, 2)


def test_draining_finishes_what_is_in_work_and_hands_back_the_rest(small):
    with Engine(small, max_active=1) as engine:

        def after(step):
            if step.done == 1:
                engine.drain()

        first, second = engine.submit(
            [quick(num_inference_steps=3), quick()], [JobOptions(on_step=after), JobOptions()]
        )
        assert first.future.result(WAIT) is not None
        with pytest.raises(HandedBackError):
            second.future.result(WAIT)
        with pytest.raises(HandedBackError):
            engine.submit([quick()])
        assert engine.alive and not engine.ready


def test_closing_without_grace_gives_up_what_is_in_work(small):
    started = []
    engine = Engine(small, max_active=1)
    with engine:
        (job,) = engine.submit([quick(num_inference_steps=1000)], [JobOptions(on_step=started.append)])
        while not started:
            assert engine.alive
    with pytest.raises(CancelledError):
        job.future.result(0)
    assert not engine.alive and len(started) < 1000


def test_a_broken_device_ends_the_engine_and_nobody_waits_for_ever(small, monkeypatch):
    def breaks(*args, **kwargs):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with Engine(small, max_active=1) as engine:
        monkeypatch.setattr(engine._evaluator, "transformer", breaks)
        jobs = engine.submit([quick(), quick()])
        for job in jobs:
            with pytest.raises(HandedBackError):
                job.future.result(WAIT)
        assert isinstance(engine._loop.exception(WAIT), BrokenDeviceError)
        assert not engine.alive and not engine.ready


def test_joined_forwards_give_the_same_pictures_within_rounding(bundled, monkeypatch):
    """What a GPU does: rows of several requests, at several times, with texts of several lengths, in one forward."""
    monkeypatch.setattr(SanaMS, "_by_row", lambda self, x: False)
    rng = random.Random(3)
    requests = [any_request(rng, num_inference_steps=3) for _ in range(10)]
    requests += [any_request(rng, num_inference_steps=2, pag_scale=2.0, height=64, width=64) for _ in range(4)]
    expected = [bundled.generate(request) for request in requests]
    with Engine(bundled, join=True, max_active=14) as engine:
        done = [job.future.result(WAIT) for job in engine.submit(requests)]
        stats = engine.stats()
    for image, offline in zip(done, expected, strict=True):
        assert (image - offline).norm() <= 1e-4 * offline.norm()
    assert stats.forwards < stats.steps / 1.5


def test_what_cannot_be_served_is_said(small):
    class Compiled(SanaPipeline):
        _compiled = object()

    compiled = Compiled.__new__(Compiled)
    compiled.__dict__.update(small.__dict__ | {"_compiled": object()})
    with pytest.raises(ValueError, match="compiled"):
        Engine(compiled)
    with pytest.raises(ValueError, match="weights"):
        Engine(SanaPipeline(small.config, device="cpu"))
    with pytest.raises(ValueError, match="at least 1"):
        Engine(small, max_queue=0)
    engine = Engine(small)
    with pytest.raises(HandedBackError):
        engine.submit([quick()])
    engine.close()


@pytest.mark.gpu
def test_on_a_gpu_company_changes_a_picture_within_rounding_only():
    from tests.serving.conftest import BUNDLED

    pipeline = SanaPipeline.from_pretrained(BUNDLED, device="cuda", dtype="fp32")
    rng = random.Random(1)
    requests = [any_request(rng, num_inference_steps=3) for _ in range(12)]
    expected = [pipeline.generate(request) for request in requests]
    with Engine(pipeline, max_active=12) as engine:
        done = [job.future.result(WAIT) for job in engine.submit(requests)]
        stats = engine.stats()
    for image, offline in zip(done, expected, strict=True):
        assert (image - offline).norm() <= 1e-3 * offline.norm()
    assert stats.forwards < stats.steps / 1.5


def test_memory_is_given_back_when_no_work_came_for_a_while(small, monkeypatch):
    given, calls = threading.Event(), []
    monkeypatch.setattr(engine_module, "GIVE_BACK_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "give_back", lambda: (calls.append(1), given.set()))
    with Engine(small) as engine:
        for rests in (1, 2):
            assert given.wait(WAIT) and len(calls) >= rests
            given.clear()
            (job,) = engine.submit([quick()])
            assert job.future.result(WAIT) is not None


def test_memory_is_given_back_now_and_then_while_there_is_work(small, monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(engine_module, "GIVE_BACK_SECONDS", 2.5)
    monkeypatch.setattr(engine_module, "give_back", lambda: calls.append(now[0]))

    def second(_):
        now[0] += 1.0

    with Engine(small, clock=lambda: now[0]) as engine:
        (job,) = engine.submit([quick(num_inference_steps=8)], [JobOptions(on_step=second)])
        job.future.result(WAIT)
    assert calls == [3.0, 6.0]


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_a_picture_leaves_no_garbage_that_only_the_collector_finds(small, monkeypatch, ending):
    """Tensors in circles stay for thousands of requests: the collector looks at old objects rarely."""

    def make(engine):
        told = threading.Event()
        steps = 100 if ending == "cancelled" else 2
        (job,) = engine.submit([quick(num_inference_steps=steps)], [JobOptions(on_step=lambda _: told.set())])
        if ending == "cancelled":
            assert told.wait(WAIT)
            engine.cancel([job])
        return job.future.exception(WAIT)

    def kept():
        return sum(issubclass(type(one), torch.Tensor | SteppedPipeline | Coroutine) for one in gc.get_objects())

    with Engine(small) as engine:
        if ending == "failed":
            monkeypatch.setattr(small, "decode", lambda *_: {}["missing"])
        make(engine)
        gc.collect()
        gc.disable()
        try:
            before = kept()
            for _ in range(5):
                assert (make(engine) is None) == (ending == "finished")
            make_quiet(engine)
            assert kept() <= before + 1
        finally:
            gc.enable()


def make_quiet(engine):
    """Waits until the engine's threads have let go of what they did last."""
    end = time.monotonic() + WAIT
    while not engine.idle:
        assert time.monotonic() < end
    engine._threads.submit(int).result(WAIT)
