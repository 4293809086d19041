"""The page of the web app: what stands where, and what each button does. Pictures are made in `generation.py`.

`build_demo(pipeline)` gives the page; `.launch(**launch_settings())` shows it. Gradio is imported when that is called.
"""

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from typing import Any

from app import history, page_text
from app.demo_parts import Parts, arrange, launch_settings
from app.generation import DONE, BusyError, Job, Studio
from app.options import DemoOptions
from app.pictures import Picture, PictureFolder
from app.recipes import read_dropped, restore_fields, what_differs
from app.safety_check import SafetyCheck, open_safety_check
from app.styles import NO_STYLE, load_styles
from app.wishes import Limits, WishError, read_wish
from sana.pipelines.options import InferenceOptions
from sana.pipelines.sana_pipeline import SanaPipeline

__all__ = ["Page", "build_demo", "launch_settings"]

PAUSE = 0.1  # seconds between two updates of the status at least
TICK = 0.5  # seconds after which elapsed and remaining time are shown anew


def build_demo(
    pipeline: SanaPipeline,
    options: DemoOptions | None = None,
    safety: SafetyCheck | None = None,
    *,
    opened_with: InferenceOptions | None = None,
) -> Any:
    """Returns the page as a `gradio.Blocks`; loads nothing and draws nothing.

    Args:
        pipeline: with its weights.
        options: what the page starts with, and its limits.
        safety: the check of prompts; None for the one that the options name.
        opened_with: the options that the pipeline was opened with: recipes name config, quantization and the like by
            them. None for a pipeline of its weights alone.

    Returns:
        The Blocks. `.actions` holds what the buttons do; `.close()` stops the work and removes the pictures.

    Raises:
        StyleError: a file of styles is broken.
        ValueError: Gradio is not installed.
        OSError: the output folder cannot be made.
        FetchError, CheckpointError: the safety check cannot be had.
    """
    gr = _gradio()
    options = options or DemoOptions()
    safety = safety if safety is not None else open_safety_check(options)
    limits = Limits.of(pipeline, options, load_styles())
    studio = Studio(pipeline, options, safety, PictureFolder(output=options.output), opened_with)

    class Demo(gr.Blocks):  # type: ignore[name-defined]
        """The page, which cleans up when it is closed."""

        def close(self, *args: Any, **kwargs: Any) -> None:
            studio.close()
            super().close(*args, **kwargs)

    gr.set_static_paths([studio.folder.path])  # served as they are: neither copied nor encoded anew
    with Demo(title="Sana", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        parts = arrange(limits, options, pipeline, safety.notice)
        demo.actions = Page(studio, limits, parts)
        _connect(demo, demo.actions, parts)
    demo.queue(default_concurrency_limit=8, max_size=options.max_queue + 64)
    return demo


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError("The web app needs gradio: pip install 'sana-python[gradio]'.") from error


class Page:
    """The functions behind the buttons. Each returns what changes, by part of the page.

    Args:
        studio: makes the pictures.
        limits: of the model.
        parts: the components of the page.
    """

    def __init__(self, studio: Studio, limits: Limits, parts: Parts) -> None:
        self.studio = studio
        self.limits = limits
        self.parts = parts
        self._gr = _gradio()

    async def generate(self, stored: object, *values: Any, owner: str | None = None) -> AsyncIterator[dict[Any, Any]]:
        """Makes pictures; yields the page's changes while they come.

        Args:
            stored: the browser's history.
            *values: of `parts.fields`, in their order.
            owner: the session.
        """
        parts, loop, happened = self.parts, asyncio.get_running_loop(), asyncio.Event()
        fields = dict(zip(parts.fields, values, strict=True))
        job: Job | None = None
        try:
            wish = read_wish(fields, self.limits)
            job = self.studio.submit(wish, owner, lambda: _tell(loop, happened))
            yield {
                parts.error: "",
                parts.status: page_text.status(job.progress()),
                parts.fields["seed"]: wish.seed,
                parts.history_state: (kept := history.add(stored, wish.prompt)),
                **self.show_history(kept),
                **self._buttons(busy=True),
            }
            async for change in self._follow(job, happened):
                yield change
        except (WishError, BusyError) as error:
            yield {parts.error: page_text.message(str(error))}
        finally:
            if job is not None and not job.ended.is_set():  # the browser went away
                self.studio.drop(job)

    async def _follow(self, job: Job, happened: asyncio.Event) -> AsyncIterator[dict[Any, Any]]:
        """Yields the changes of a wish in line until it has ended, and then all that it leaves."""
        parts, shown = self.parts, 0
        while (progress := job.progress()).phase != DONE:
            change = {parts.status: page_text.status(progress)}
            if len(job.pictures) > shown:
                shown = len(job.pictures)
                change |= self._show(job.pictures)
            yield change
            await asyncio.sleep(PAUSE)
            try:
                await asyncio.wait_for(happened.wait(), TICK)
            except TimeoutError:
                continue
            happened.clear()
        last = self._show(job.pictures) if len(job.pictures) > shown else {}
        ended = {parts.status: page_text.outcome(job), parts.error: page_text.message(job.error)}
        yield {**last, **ended, **self._buttons(busy=False)}

    def _show(self, pictures: list[Picture]) -> dict[Any, Any]:
        """Returns the gallery with pictures, the first of them chosen."""
        columns = 1 if len(pictures) == 1 else 2
        shown = [(str(picture.path), page_text.caption(picture.recipe)) for picture in pictures]
        gallery = self._gr.Gallery(value=shown, columns=columns, selected_index=None)
        return {self.parts.gallery: gallery, self.parts.pictures: list(pictures), **self.select(list(pictures), 0)}

    def _buttons(self, *, busy: bool) -> dict[Any, Any]:
        button = self._gr.Button
        return {self.parts.generate: button(interactive=not busy), self.parts.cancel: button(interactive=busy)}

    def settle(self) -> dict[Any, Any]:
        """Returns the buttons as they are while nothing is made."""
        return self._buttons(busy=False)

    def cancel(self, owner: str | None = None) -> None:
        """Stops what a session has asked for; `generate` says how it ended."""
        self.studio.cancel(owner)

    def select(self, pictures: list[Picture], index: int) -> dict[Any, Any]:
        """Shows the recipe of a picture and makes it the one to download.

        Args:
            pictures: of the gallery.
            index: of the one that was chosen.
        """
        if not 0 <= index < len(pictures):
            return {}
        picture, download = pictures[index], self._gr.DownloadButton
        there = picture.path.is_file()
        return {
            self.parts.recipe: page_text.recipe_card(picture.recipe),
            self.parts.chosen: index,
            self.parts.download: download(value=str(picture.path) if there else None, interactive=there),
            self.parts.reuse: self._gr.Button(interactive=True),
        }

    def restore(self, path: str | None) -> dict[Any, Any]:
        """Fills the fields from the recipe in a dropped PNG. Gradio removes the dropped copy within an hour or two."""
        if not path:
            return {self.parts.error: ""}
        try:
            recipe = read_dropped(path)
            change = self._fill(recipe)
        except WishError as error:
            change = {self.parts.error: page_text.message(str(error))}
        return {**change, self.parts.restore: None}

    def reuse(self, pictures: list[Picture], index: int) -> dict[Any, Any]:
        """Fills the fields from the recipe of the chosen picture."""
        if not 0 <= index < len(pictures):
            return {self.parts.error: ""}
        return self._fill(pictures[index].recipe)

    def _fill(self, recipe: Any) -> dict[Any, Any]:
        fields = restore_fields(recipe, self.limits)
        others = what_differs(recipe, self.studio.here())
        says = "Restored; Generate makes the same picture."
        if others:
            says = f"Restored, but made with other settings ({', '.join(others)}): the picture will differ."
        change = {self.parts.fields[name]: value for name, value in fields.items() if name in self.parts.fields}
        change[self.parts.fields["style"]] = NO_STYLE
        places = {self.parts.aspect: fields["aspect"], self.parts.image_size: fields["image_size"]}
        return {**change, **places, self.parts.error: "", self.parts.status: page_text.note(says)}

    def show_history(self, stored: object) -> dict[Any, Any]:
        """Returns the list of the last prompts, and the button that empties it; both are there with a prompt only."""
        prompts = history.clean(stored)
        samples = [[prompt] for prompt in prompts]
        shown = self._gr.Dataset(samples=samples, sample_labels=history.labels(prompts), visible=bool(prompts))
        return {self.parts.history: shown, self.parts.forget: self._gr.Button(visible=bool(prompts))}

    def recall(self, stored: object, index: int) -> Any:
        """Returns the prompt of the history's entry that was clicked."""
        prompts = history.clean(stored)
        return prompts[index] if 0 <= index < len(prompts) else self._gr.skip()

    def forget(self) -> dict[Any, Any]:
        """Empties the history."""
        return {self.parts.history_state: [], **self.show_history([])}


def _tell(loop: asyncio.AbstractEventLoop, happened: asyncio.Event) -> None:
    """Sets an event of a loop from another thread."""
    with contextlib.suppress(RuntimeError):  # the loop has ended and needs to know nothing
        loop.call_soon_threadsafe(happened.set)


def _connect(demo: Any, page: Page, parts: Parts) -> None:
    """Says what every button does. Nothing is open to programs: the server is for them."""
    gr = _gradio()
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    fields = list(parts.fields.values())
    everything = [*parts.outputs, *fields]

    async def generate(request: gr.Request, stored: Any, *values: Any) -> Any:  # type: ignore[name-defined]
        async for change in page.generate(stored, *values, owner=request.session_hash):
            yield change

    def cancel(request: gr.Request) -> None:  # type: ignore[name-defined]
        page.cancel(request.session_hash)

    def select(pictures: list[Picture], event: gr.SelectData) -> Any:  # type: ignore[name-defined]
        return page.select(pictures, event.index)

    gr.on(
        [parts.generate.click, parts.fields["prompt"].submit],
        generate,
        [parts.history_state, *fields],
        everything,
        concurrency_limit=None,  # the studio has its own queue
        **quiet,
    ).then(page.settle, None, [parts.generate, parts.cancel], queue=False, **quiet)
    parts.cancel.click(cancel, None, None, queue=False, **quiet)
    parts.gallery.select(select, [parts.pictures], parts.chosen_outputs, **quiet)
    parts.restore.upload(page.restore, [parts.restore], everything, **quiet)
    parts.reuse.click(page.reuse, [parts.pictures, parts.chosen], everything, **quiet)
    parts.examples.click(lambda sample: sample[0], [parts.examples], [parts.fields["prompt"]], **quiet)
    parts.history.click(page.recall, [parts.history_state, parts.history], [parts.fields["prompt"]], **quiet)
    parts.forget.click(page.forget, None, [parts.history_state, parts.history, parts.forget], **quiet)
    demo.load(page.show_history, [parts.history_state], [parts.history, parts.forget], **quiet)
    demo.unload(cancel)
    parts.connect_sizes()
