"""What stands on the page and where: components, theme and style sheet. What the buttons do is in `demo.py`."""

import importlib
import json
from dataclasses import dataclass
from typing import Any

from app import examples, page_text
from app.options import DemoOptions
from app.presets import ASPECTS, CUSTOM, STEP
from app.styles import NO_STYLE, STYLES
from app.wishes import MAX_PROMPT, Limits
from sana.pipelines.options import bundled
from sana.pipelines.sana_pipeline import SanaPipeline

CSS = f"{STYLES}/sana.css"
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
DARK = "() => { document.body.classList.toggle('dark'); }"


@dataclass
class Parts:
    """The components of the page.

    Attributes:
        fields: what a wish is read from, by its names there.
        aspect, image_size: presets, which fill width and height.
        generate, cancel, gallery, status, error, recipe, download, reuse: of the pictures.
        restore: takes a PNG with a recipe.
        examples, history, forget: prompts to click at.
        pictures, chosen: of the gallery, and the one whose recipe is shown; kept by the server for each session.
        history_state: kept by the browser.
        sizes: (width, height) of every preset, by side and aspect.
    """

    fields: dict[str, Any]
    aspect: Any
    image_size: Any
    generate: Any
    cancel: Any
    gallery: Any
    status: Any
    error: Any
    recipe: Any
    download: Any
    reuse: Any
    restore: Any
    examples: Any
    history: Any
    forget: Any
    pictures: Any
    chosen: Any
    history_state: Any
    sizes: dict[str, dict[str, tuple[int, int]]]

    @property
    def chosen_outputs(self) -> list[Any]:
        """What changes when a picture is chosen."""
        return [self.recipe, self.download, self.reuse, self.chosen]

    @property
    def outputs(self) -> list[Any]:
        """What may change beside the fields."""
        pictures = [self.gallery, self.pictures, *self.chosen_outputs]
        prompts = [self.history_state, self.history, self.forget]
        places = [self.aspect, self.image_size, self.restore]
        return [self.status, self.error, self.generate, self.cancel, *pictures, *prompts, *places]

    def connect_sizes(self) -> None:
        """Lets presets fill width and height, in the browser itself, so that no click can overtake them."""
        inputs = [self.aspect, self.image_size, self.fields["width"], self.fields["height"]]
        fill = (
            "(aspect, side, width, height) => { "
            f"const size = ({json.dumps(self.sizes)}[side] || {{}})[aspect]; return size || [width, height]; }}"
        )
        for preset in (self.aspect, self.image_size):
            preset.input(None, inputs, inputs[2:], js=fill, api_visibility="private")
        for side in inputs[2:]:
            side.input(None, None, [self.aspect], js=f"() => {CUSTOM!r}", api_visibility="private")


def launch_settings() -> dict[str, Any]:
    """Returns the arguments of the page's `launch` that make it look as it should, and keep it to itself."""
    gr = importlib.import_module("gradio")
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONT,
        font_mono=MONO,
    )
    return {"theme": theme, "css_paths": [bundled(CSS)], "footer_links": [], "show_error": False}


def arrange(limits: Limits, options: DemoOptions, pipeline: SanaPipeline, notice: str) -> Parts:
    """Puts the components into the Blocks that is open; returns them.

    Args:
        limits: of the model.
        options: what the page starts with.
        pipeline: names the model.
        notice: of the safety check, Markdown.
    """
    gr = importlib.import_module("gradio")
    parts: dict[str, Any] = {"fields": {}, "sizes": limits.presets.table()}
    model = pipeline.config.model
    with gr.Row(elem_id="top"):
        gr.HTML(page_text.heading(model.model, f"{model.image_size} px"), elem_id="heading", padding=False)
        gr.Button("◐", elem_id="theme-toggle", size="sm", min_width=40, scale=0).click(None, js=DARK)
    with gr.Row(elem_id="page"):
        with gr.Column(elem_id="compose"):
            _compose(gr, parts)
            gr.Markdown(notice, elem_id="safety-notice")
        with gr.Column(elem_id="results"):
            _results(gr, parts)
        with gr.Column(elem_id="settings"):
            _settings(gr, parts, limits, options)
            _advanced(gr, parts, limits)
            parts["restore"] = gr.File(
                label="Drop a PNG made by Sana here to restore its settings",
                show_label=False,
                type="filepath",
                height=92,
                elem_id="restore",
            )
            _prompts(gr, parts, examples.examples(model.model))
    parts["pictures"], parts["chosen"] = gr.State([]), gr.State(0)
    parts["history_state"] = gr.BrowserState([], storage_key="sana-prompts", secret="sana-prompts")
    order = ("prompt", "negative_prompt", "style", "width", "height", "steps", "guidance", "pag", "seed", "randomise")
    parts["fields"] = {name: parts["fields"][name] for name in (*order, "number")}
    return Parts(**parts)


def _compose(gr: Any, parts: dict[str, Any]) -> None:
    parts["fields"]["prompt"] = gr.Textbox(
        label="Prompt",
        show_label=False,
        placeholder="What shall the picture show? Shift + Enter draws it.",
        lines=3,
        max_lines=8,
        max_length=MAX_PROMPT + 1,  # one more, so that a cut prompt is noticed
        autofocus=True,
        elem_id="prompt",
    )
    with gr.Row(elem_id="actions"):
        parts["generate"] = gr.Button("Generate", variant="primary", size="lg", scale=3, elem_id="generate")
        parts["cancel"] = gr.Button("Cancel", size="lg", scale=1, min_width=96, interactive=False, elem_id="cancel")
    parts["error"] = gr.HTML("", elem_id="error", padding=False)


def _results(gr: Any, parts: dict[str, Any]) -> None:
    parts["status"] = gr.HTML(page_text.note(page_text.READY), elem_id="status", padding=False)
    parts["gallery"] = gr.Gallery(
        label="Pictures",
        show_label=False,
        columns=1,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="gallery",
    )
    with gr.Row(elem_id="picture-actions"):
        parts["download"] = gr.DownloadButton("Download PNG", interactive=False, size="sm", elem_id="download")
        parts["reuse"] = gr.Button("Reuse settings", interactive=False, size="sm", elem_id="reuse")
    parts["recipe"] = gr.HTML(page_text.EMPTY_RECIPE, elem_id="recipe", padding=False)


def _settings(gr: Any, parts: dict[str, Any], limits: Limits, options: DemoOptions) -> None:
    fields, presets = parts["fields"], limits.presets
    fields["style"] = gr.Radio(list(limits.styles), value=NO_STYLE, label="Style", elem_id="style")
    parts["aspect"] = gr.Radio([*ASPECTS, CUSTOM], value="1:1", label="Aspect ratio", elem_id="aspect")
    sides = [(presets.describe(side), side) for side in presets.sides]
    width, height = presets.size("1:1", presets.first)
    bounds = f"{presets.smallest} to {presets.greatest}, in steps of {STEP}"
    with gr.Row(elem_classes="fields"):
        parts["image_size"] = gr.Dropdown(
            sides, value=presets.first, label="Size", filterable=False, min_width=180, scale=2, elem_id="image-size"
        )
        fields["width"] = gr.Number(width, label="Width", step=STEP, min_width=90, elem_id="width")
        fields["height"] = gr.Number(height, label="Height", step=STEP, min_width=90, elem_id="height")
    gr.HTML(f'<p class="hint">Width and height: {bounds}.</p>', padding=False)
    fields["number"] = _slider(
        gr, label="Pictures", value=1, minimum=1, maximum=max(2, options.max_images), step=1, elem_id="number"
    )
    with gr.Row(elem_classes="fields"):
        fields["seed"] = gr.Number(options.seed, label="Seed", min_width=110, elem_id="seed")
        fields["randomise"] = gr.Checkbox(True, label="Random seed", min_width=110, elem_id="randomise")


def _advanced(gr: Any, parts: dict[str, Any], limits: Limits) -> None:
    fields = parts["fields"]
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        fields["negative_prompt"] = gr.Textbox(
            label="Negative prompt",
            placeholder="What to stay away from" if limits.negative else "This model has none",
            interactive=limits.negative,
            lines=2,
            max_length=MAX_PROMPT + 1,
            elem_id="negative-prompt",
        )
        fields["steps"] = _slider(
            gr, label="Steps", value=limits.steps, minimum=1, maximum=limits.max_steps, step=1, elem_id="steps"
        )
        fields["guidance"] = _slider(
            gr,
            label="Guidance (CFG)",
            info="How closely the prompt is followed; 1 is off.",
            value=limits.guidance,
            minimum=1,
            maximum=limits.max_guidance,
            step=0.1,
            elem_id="guidance",
        )
        can = limits.max_pag > 1
        fields["pag"] = _slider(
            gr,
            label="PAG",
            info="Perturbed-attention guidance; 1 is off." if can else "This model cannot do PAG.",
            value=limits.pag,
            minimum=1,
            maximum=limits.max_pag if can else 2,
            step=0.1,
            interactive=can,
            elem_id="pag",
        )


def _prompts(gr: Any, parts: dict[str, Any], prompts: tuple[str, ...]) -> None:
    parts["examples"] = gr.Dataset(
        label="Examples",
        components=["textbox"],
        samples=[[prompt] for prompt in prompts],
        elem_id="examples",
    )
    parts["history"] = gr.Dataset(
        label="Your last prompts",
        components=["textbox"],
        samples=[],
        type="index",
        samples_per_page=20,
        visible=False,
        elem_id="history",
    )
    parts["forget"] = gr.Button("Clear history", size="sm", visible=False, elem_id="history-clear")


def _slider(gr: Any, **options: Any) -> Any:
    """Returns a slider that lets every number pass: what is wrong with one is said where all errors are."""
    slider = gr.Slider(buttons=[], min_width=140, **options)
    slider.preprocess = lambda payload: payload
    return slider
