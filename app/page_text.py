"""What the page says, as HTML: status, errors, recipes, headings. Text from outside is escaped; no Gradio is here."""

import json
from html import escape

from app.generation import CHECKING, DECODING, DRAWING, LOADING, WAITING, Job, Progress
from sana.pipelines.recipe import Recipe

READY = "Ready."
EMPTY_RECIPE = '<p class="hint">Choose a picture to see how it was made.</p>'


def heading(model: str, detail: str) -> str:
    """Returns the page's title: the model's name and one line about it."""
    return (
        '<div class="brand"><span class="mark" aria-hidden="true"></span><div><h1>Sana</h1>'
        f"<p>{escape(model)} <span>{escape(detail)}</span></p></div></div>"
    )


def message(text: str | None) -> str:
    """Returns an error for the page's error area; nothing for None."""
    return "" if not text else f'<div class="message" role="alert">{escape(text)}</div>'


def note(text: str) -> str:
    """Returns a line for the status area."""
    return f'<div class="line"><span>{escape(text)}</span></div>'


def status(progress: Progress) -> str:
    """Returns the status area of a wish that is on its way: what is done, a bar, elapsed and remaining time."""
    percent = 100 * min(progress.share, 1.0)
    time = seconds(progress.elapsed)
    if progress.remaining is not None:
        time += f" · about {seconds(progress.remaining)} left"
    which = f"Picture {progress.picture} of {progress.pictures} · " if progress.pictures > 1 else ""
    says = {
        WAITING: f"Waiting: number {progress.place} in the queue",
        CHECKING: "Checking the prompt",
        LOADING: "Preparing the model",
        DRAWING: f"{which}step {progress.step} of {progress.steps}",
        DECODING: f"{which}step {progress.step} of {progress.steps}, painting the pixels",
    }[progress.phase]
    says = says[0].upper() + says[1:]
    known = progress.phase in (DRAWING, DECODING)
    bar = f'style="width:{percent:.1f}%"' if known else 'class="unknown"'
    value = f'aria-valuenow="{percent:.0f}"' if known else ""
    return (
        f'<div class="line"><span>{escape(says)}</span><span class="time">'
        f"{'' if progress.phase == WAITING else escape(time)}</span></div>"
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" {value}>'
        f"<i {bar}></i></div>"
    )


def outcome(job: Job) -> str:
    """Returns the status area of a wish that has ended."""
    made, asked = len(job.pictures), job.wish.number
    took = seconds(job.progress().elapsed)
    if job.cancelled and made < asked:
        kept = f"{made} of {asked} pictures kept" if made else "no picture was finished"
        return note(f"Cancelled after {took}; {kept}.")
    if job.error is not None:
        return note(f"Stopped; {made} of {asked} pictures kept." if made else "Stopped.")
    return note(f"{made} {'picture' if made == 1 else 'pictures'} in {took}.")


def seconds(time: float) -> str:
    """Returns a time in words: 0.4 s, 12 s, 3 min 05 s."""
    if time < 9.95:
        return f"{time:.1f} s"
    whole = round(time)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def caption(recipe: Recipe) -> str:
    """Returns what stands below a picture."""
    return f"seed {recipe.seed}"


def recipe_card(recipe: Recipe) -> str:
    """Returns everything that decides a picture as a list, and the whole recipe as JSON to unfold."""
    size = f"{recipe.width} × {recipe.height}"
    rows = {
        "Seed": recipe.seed,
        "Size": size,
        "Steps": recipe.num_inference_steps,
        "Sampler": recipe.sampler,
        "Guidance": f"{recipe.guidance_scale:g}",
        "PAG": f"{recipe.pag_scale:g}" if recipe.pag_scale > 1 else "off",
        "Precision": recipe.dtype,
        "Weights": recipe.weights[:8],
        "Recipe": recipe.hash[:8],
    }
    texts = {"Prompt": recipe.prompt, "Negative prompt": recipe.negative_prompt}
    long = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items() if text)
    short = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows.items())
    whole = escape(json.dumps(recipe.as_dict(), indent=1, ensure_ascii=False))
    return (
        f'<dl class="texts">{long}</dl><dl class="facts">{short}</dl>'
        f"<details><summary>The whole recipe</summary><pre>{whole}</pre></details>"
    )
