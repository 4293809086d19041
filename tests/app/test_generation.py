"""The studio: the pipeline's very pictures, one wish at a time, cancel that stops, errors without secrets."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.generation import (
    DECODING,
    DONE,
    DRAWING,
    NO_MEMORY,
    NO_NUMBER,
    NO_SPACE,
    UNKNOWN,
    WAITING,
    BusyError,
    Job,
    Progress,
    Studio,
)
from app.options import DemoOptions
from app.pictures import PictureFolder
from app.safety_check import NoCheck
from app.styles import load_styles
from app.wishes import Wish
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.images import read_recipe
from sana.pipelines.replay import replay
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline

WAIT = 120  # seconds, on a busy machine
WISH = Wish("a red circle", width=64, height=64, steps=3, guidance=4.5, pag=1.0, seed=5)


class StubPipeline:
    """Takes a step when it is told to; its pictures are of one colour, the seed's.

    Args:
        like: gives config, device and dtype.
    """

    def __init__(self, like: SanaPipeline) -> None:
        self.config, self.device, self.dtype, self.model_path = like.config, like.device, like.dtype, "stub"
        self.transformer = like.transformer
        self.go = threading.Semaphore(0)
        self.calls: list[Request] = []
        self.at_once = 0
        self.error: BaseException | None = None
        self.before_step: Callable[[int], None] = lambda step: None

    def weights_hash(self) -> str:
        return "0" * 32

    def generate(self, request: Request) -> list[Image.Image]:
        self.calls.append(request)
        self.at_once += 1
        assert self.at_once == 1, "two computations at a time"
        try:
            for step in range(request.num_inference_steps or 0):
                self.before_step(step)
                assert self.go.acquire(timeout=WAIT)
                if self.error is not None:
                    raise self.error
                assert request.callback_on_step_end is not None
                request.callback_on_step_end(self, step, 0.0, {})
        finally:
            self.at_once -= 1
        assert isinstance(request.seed, list)
        return [Image.new("RGB", (request.width or 0, request.height or 0), (seed, 0, 0)) for seed in request.seed]


@pytest.fixture
def stub(small: SanaPipeline) -> StubPipeline:
    return StubPipeline(small)


@pytest.fixture
def make() -> Iterator[Callable[..., Studio]]:
    studios: list[Studio] = []

    def make(pipeline: Any, options: DemoOptions | None = None, safety: Any = None) -> Studio:
        studios.append(Studio(pipeline, options or DemoOptions(), safety or NoCheck(), PictureFolder()))
        return studios[-1]

    yield make
    for studio in studios:
        if isinstance(studio.pipeline, StubPipeline):
            studio.pipeline.go.release(1000)
        studio.close()
        assert not studio.folder.path.exists()


def wish(**changes: Any) -> Wish:
    return Wish(**{**{name: getattr(WISH, name) for name in WISH.__dataclass_fields__}, **changes})


def done(job: Job) -> Job:
    assert job.ended.wait(WAIT)
    return job


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_picture_i_is_the_pipelines_own_with_seed_plus_i(bundled: SanaPipeline, make: Callable[..., Studio]) -> None:
    style = load_styles()["Pixel art"]
    asked = wish(width=288, height=224, number=2, steps=2, pag=2.0, negative_prompt="a cat", style=style)
    job = done(make(bundled).submit(asked))
    assert job.error is None and len(job.pictures) == 2
    for index, picture in enumerate(job.pictures):
        expected = bundled(
            style.prompt.replace("{prompt}", "a red circle"),
            height=224,
            width=288,
            negative_prompt=f"a cat, {style.negative_prompt}",
            num_inference_steps=2,
            guidance_scale=4.5,
            pag_guidance_scale=2.0,
            seed=5 + index,
            output_type="pil",
        )[0]
        assert np.array_equal(pixels(picture.path), np.asarray(expected))


def test_pictures_of_one_call_are_those_of_single_calls(bundled: SanaPipeline, make: Callable[..., Studio]) -> None:
    asked = wish(width=64, height=64, number=3, steps=2)
    one_by_one = done(make(bundled).submit(asked)).pictures
    together = done(make(bundled, DemoOptions(bs=2)).submit(asked)).pictures
    assert [one.recipe for one in together] == [one.recipe for one in one_by_one]
    for first, second in zip(one_by_one, together, strict=True):
        assert np.array_equal(pixels(first.path), pixels(second.path))


def test_the_stored_picture_can_be_replayed(bundled: SanaPipeline, make: Callable[..., Studio], tmp_path: Path) -> None:
    picture = done(make(bundled).submit(wish(steps=2))).pictures[0]
    stored = read_recipe(picture.path)
    assert stored == picture.recipe.as_dict() and stored["made_with"]["model_path"] is None
    report = replay(picture.path, output=tmp_path / "again.png")
    assert report.identical and report.differences == []


def test_cancel_stops_after_the_step_in_work_and_keeps_what_is_finished(
    stub: StubPipeline, make: Callable[..., Studio]
) -> None:
    studio = make(stub)
    reached = threading.Event()
    stub.before_step = lambda step: reached.set() if (len(stub.calls), step) == (2, 1) else None
    stub.go.release(4)  # one picture and the first step of the second
    job = studio.submit(wish(number=3), "me")
    assert reached.wait(WAIT)
    assert studio.cancel("someone else") == 0 and not job.cancelled
    assert studio.cancel("me") == 1
    stub.go.release(1)
    done(job)
    assert len(job.pictures) == 1 and job.error is None and job.cancelled
    assert len(stub.calls) == 2 and job.progress().step == 1  # the step in work was not counted: it stopped there
    stub.go.release(3)
    assert len(done(studio.submit(wish(), "me")).pictures) == 1


def test_the_real_pipeline_draws_the_same_after_a_cancel(small: SanaPipeline, make: Callable[..., Studio]) -> None:
    studio = make(small)
    before = done(studio.submit(wish())).pictures[0]
    happened = threading.Event()
    cancelled = studio.submit(wish(steps=50), "me", lambda: happened.set() or None)
    while cancelled.progress().step == 0 and not cancelled.ended.is_set():
        assert happened.wait(WAIT)
        happened.clear()
    studio.cancel("me")
    assert not done(cancelled).pictures and cancelled.progress().step < 50
    again = done(studio.submit(wish())).pictures[0]
    assert np.array_equal(pixels(before.path), pixels(again.path))


def test_wishes_wait_in_line_and_a_full_line_says_so(stub: StubPipeline, make: Callable[..., Studio]) -> None:
    studio = make(stub, DemoOptions(max_queue=2))
    first, second, third = (studio.submit(wish(), name) for name in ("a", "b", "c"))
    assert [job.progress().phase for job in (second, third)] == [WAITING, WAITING]
    assert [job.progress().place for job in (second, third)] == [1, 2]
    with pytest.raises(BusyError, match="The queue is full: 2 wishes are waiting"):
        studio.submit(wish(), "d")
    with pytest.raises(BusyError, match="making pictures already"):
        studio.submit(wish(), "b")
    assert studio.cancel("b") == 1 and second.ended.is_set() and not second.pictures
    assert third.progress().place == 1
    fourth = studio.submit(wish(), "d")
    stub.go.release(9)
    assert [len(done(job).pictures) for job in (first, third, fourth)] == [1, 1, 1]
    assert [call.seed for call in stub.calls] == [[5]] * 3


def test_progress_counts_steps_of_all_pictures(stub: StubPipeline, make: Callable[..., Studio]) -> None:
    seen: list[Progress] = []
    jobs: list[Job] = []
    ready = threading.Event()
    stub.go.release(6)
    studio = make(stub)

    def note() -> None:
        ready.wait(WAIT)
        seen.append(jobs[0].progress())

    jobs.append(studio.submit(wish(number=2), on_change=note))
    ready.set()
    done(jobs[0])
    drawn = [(one.picture, one.step) for one in seen if one.phase in (DRAWING, DECODING) and one.step]
    assert list(dict.fromkeys(drawn)) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    shares = [one.share for one in seen]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert [one.elapsed for one in seen] == sorted(one.elapsed for one in seen)
    assert seen[-1].phase == DONE
    left = [one.remaining for one in seen if one.remaining is not None]
    assert left and all(time >= 0 for time in left) and left[-1] == 0


def test_a_refused_prompt_is_not_drawn(stub: StubPipeline, make: Callable[..., Studio]) -> None:
    asked: list[str] = []
    safety = SimpleNamespace(notice="", check=lambda prompt: asked.append(prompt) or "This prompt is refused.")
    style = load_styles()["Anime"]
    job = done(make(stub, safety=safety).submit(wish(style=style)))
    assert job.error == "This prompt is refused." and not stub.calls and not job.pictures
    assert asked == [style.prompt.replace("{prompt}", "a red circle")]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NonFiniteError("block 3 of /secret"), NO_NUMBER),
        (torch.OutOfMemoryError("CUDA /secret"), NO_MEMORY),
        (MemoryError("/secret"), NO_MEMORY),
        (OSError("/secret is full"), NO_SPACE),
    ],
)
def test_a_failure_is_one_sentence_and_the_next_wish_is_made(
    stub: StubPipeline, make: Callable[..., Studio], error: Exception, says: str
) -> None:
    studio = make(stub)
    stub.error = error
    stub.go.release(1)
    assert done(studio.submit(wish())).error == says
    stub.error = None
    stub.go.release(3)
    assert len(done(studio.submit(wish())).pictures) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_nobody_expected_is_one_sentence_too(stub: StubPipeline, make: Callable[..., Studio]) -> None:
    studio = make(stub)
    stub.error = AttributeError("/secret")
    stub.go.release(1)
    assert done(studio.submit(wish())).error == UNKNOWN
    stub.error = None
    stub.go.release(3)
    assert len(done(studio.submit(wish())).pictures) == 1


def test_closing_stops_everything(stub: StubPipeline, make: Callable[..., Studio]) -> None:
    studio = make(stub)
    jobs = [studio.submit(wish(), name) for name in ("a", "b")]
    stub.go.release(1)
    studio.close()
    assert all(done(job).cancelled and not job.pictures for job in jobs)
    assert not studio.folder.path.exists()
