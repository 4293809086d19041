"""The example workflows, run as ComfyUI runs them: their pictures are those of SanaPipeline, to the bit."""

import copy
import itertools
from typing import Any

import pytest
import torch

from sana import SanaPipeline
from sana.utils.hub import FetchError
from tests.comfyui.conftest import BUNDLED, KIND, Comfy
from tests.comfyui.executor import NodeError, PromptError
from tests.comfyui.graphs import WORKFLOWS, load, to_prompt
from tests.comfyui.stand_ins import InterruptProcessingException

OFFICIAL = ("sana_1k", "sana_2k", "sana_4k")
ALL = (*OFFICIAL, "sana_tiny")
LOADERS = {"SanaCheckpointLoader": "ckpt_name", "GemmaLoader": "model_name", "ExtraVAELoader": "vae_name"}


def entry(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """Returns the inputs of the only node of a class."""
    (found,) = (one["inputs"] for one in prompt.values() if one["class_type"] == class_type)
    return found


def node_id(prompt: dict[str, Any], class_type: str) -> str:
    return next(node for node, one in prompt.items() if one["class_type"] == class_type)


def with_bundled_model(prompt: dict[str, Any], **widgets: Any) -> dict[str, Any]:
    """Returns the same graph with the bundled model in the loaders, and other values of the sampler or the size."""
    prompt = copy.deepcopy(prompt)
    for class_type, name in LOADERS.items():
        entry(prompt, class_type)[name] = BUNDLED
    for name, value in widgets.items():
        entry(prompt, "SanaResolutionSelect" if name in ("model", "ratio") else "SanaSampler")[name] = value
    return prompt


def expected(pipeline: SanaPipeline, prompt: dict[str, Any], width: int, height: int, count: int = 1) -> torch.Tensor:
    """What SanaPipeline makes of the widgets of a graph."""
    sampler = entry(prompt, "SanaSampler")
    pictures = pipeline(
        entry(prompt, "SanaTextEncode")["text"],
        height,
        width,
        negative_prompt=entry(prompt, "GemmaTextEncode")["text"],
        num_inference_steps=sampler["steps"],
        guidance_scale=sampler["cfg"],
        pag_guidance_scale=sampler["pag"],
        sampler=sampler["sampler_name"],
        seed=sampler["seed"],
        num_images_per_prompt=count,
        use_resolution_binning=False,
        output_type="np",
        progress_bar=False,
    )
    return torch.from_numpy(pictures)


def picture(comfy: Comfy, prompt: dict[str, Any]) -> torch.Tensor:
    comfy.executor.run(prompt)
    return comfy.executor.result(node_id(prompt, "VAEDecode"))


@pytest.mark.parametrize(
    ("name", "size", "ratio", "width", "height", "steps"),
    [
        ("sana_1k", "256px", "1.00", 256, 256, 5),
        ("sana_2k", "256px", "1.29", 288, 224, 4),
        ("sana_4k", "512px", "0.50", 352, 704, 2),
    ],
)
def test_the_picture_is_the_pipelines(
    comfy: Comfy, pipeline: SanaPipeline, name: str, size: str, ratio: str, width: int, height: int, steps: int
) -> None:
    prompt = with_bundled_model(to_prompt(load(name), comfy.nodes), model=size, ratio=ratio, steps=steps)
    made = picture(comfy, prompt)
    assert made.shape == (1, height, width, 3)
    assert torch.equal(made, expected(pipeline, prompt, width, height))
    assert comfy.bars == [(step + 1, steps) for step in range(steps)]


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_the_tiny_workflow_runs_as_it_is(comfy: Comfy, pipeline: SanaPipeline, steps: int) -> None:
    prompt = to_prompt(load("sana_tiny"), comfy.nodes)
    assert entry(prompt, "SanaSampler")["steps"] == 20
    entry(prompt, "SanaSampler")["steps"] = steps
    shown = comfy.executor.run(prompt)
    made = comfy.executor.result(node_id(prompt, "VAEDecode"))
    assert torch.equal(made, expected(pipeline, prompt, 256, 256, count=4))
    assert len(shown[node_id(prompt, "SaveImage")]["images"]) == 4
    assert len(list(comfy.output.glob("sana_tiny_*.png"))) == 4


@pytest.mark.slow
def test_a_picture_of_more_than_2048_pixels_is_decoded_in_tiles(
    comfy: Comfy, pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = with_bundled_model(to_prompt(load("sana_4k"), comfy.nodes), model="2K", ratio="0.94", steps=1)
    prompt = {
        **prompt,
        node_id(prompt, "EmptySanaLatentImage"): copy.deepcopy(prompt[node_id(prompt, "EmptySanaLatentImage")]),
    }
    entry(prompt, "EmptySanaLatentImage").update(width=2176, height=2048)
    made = picture(comfy, prompt)
    vae = comfy.executor.result(node_id(prompt, "ExtraVAELoader"))
    assert vae.first_stage_model.tiling_for(2048, 2176) is not None
    pipeline.autoencoder.disable_tiling()
    try:
        whole = expected(pipeline, prompt, 2176, 2048)
    finally:
        pipeline.autoencoder._tiles_large = True
    torch.testing.assert_close(made, whole, rtol=0, atol=1e-5)


def test_guidance_and_samplers_reach_the_pipeline(comfy: Comfy, pipeline: SanaPipeline) -> None:
    prompt = to_prompt(load("sana_1k"), comfy.nodes)
    wishes = {"pag": 2.0, "cfg": 3.0, "sampler_name": "flow_euler", "steps": 3, "seed": 5, "model": "256px"}
    prompt = with_bundled_model(prompt, **wishes)
    entry(prompt, "GemmaTextEncode")["text"] = "green"
    assert torch.equal(picture(comfy, prompt), expected(pipeline, prompt, 256, 256))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_pass_validation_and_say_what_could_not_be_fetched(comfy: Comfy, name: str) -> None:
    prompt = to_prompt(load(name), comfy.nodes)
    with pytest.raises(NodeError) as raised:
        comfy.executor.run(prompt)
    assert issubclass(raised.value.kind, FetchError)
    repository = entry(prompt, "SanaCheckpointLoader")["ckpt_name"]
    assert raised.value.node == node_id(prompt, "SanaCheckpointLoader")
    assert str(raised.value).startswith(f"Could not fetch hf://{repository}/checkpoints/")
    assert "\n" not in str(raised.value)


def test_only_what_changed_runs_again(comfy: Comfy) -> None:
    prompt = with_bundled_model(to_prompt(load("sana_1k"), comfy.nodes), model="256px", steps=1)
    comfy.executor.run(prompt)
    assert len(comfy.executor.ran) == len(prompt)
    comfy.executor.run(prompt)
    assert comfy.executor.ran == []
    comfy.executor.run(with_bundled_model(prompt, seed=1))
    assert [prompt[node]["class_type"] for node in comfy.executor.ran] == ["SanaSampler", "VAEDecode", "PreviewImage"]


def test_the_stop_button_stops_between_steps(comfy: Comfy) -> None:
    prompt = with_bundled_model(to_prompt(load("sana_1k"), comfy.nodes), model="256px", steps=6)
    comfy.bars.stop_after = 2
    with pytest.raises(InterruptProcessingException):
        comfy.executor.run(prompt)
    assert comfy.bars == [(1, 6), (2, 6)]


@pytest.mark.parametrize(
    ("class_type", "name", "value", "kind"),
    [
        ("SanaCheckpointLoader", "ckpt_name", "nobody/nothing", "value_not_in_list"),
        ("SanaCheckpointLoader", "dtype", "FP8", "value_not_in_list"),
        ("ExtraVAELoader", "dtype", "FP8", "custom_validation_failed"),
        ("SanaSampler", "steps", 0, "value_smaller_than_min"),
        ("SanaSampler", "seed", 2**63, "value_bigger_than_max"),
        ("SanaSampler", "sampler_name", "euler", "value_not_in_list"),
        ("SanaSampler", "cfg", "much", "invalid_input_type"),
        ("SanaResolutionSelect", "ratio", "1.5", "value_not_in_list"),
        ("EmptySanaLatentImage", "batch_size", 0, "value_smaller_than_min"),
    ],
)
def test_a_bad_widget_is_refused_before_anything_runs(
    comfy: Comfy, class_type: str, name: str, value: Any, kind: str
) -> None:
    prompt = with_bundled_model(to_prompt(load("sana_1k"), comfy.nodes))
    entry(prompt, class_type)[name] = value
    with pytest.raises(PromptError) as raised:
        comfy.executor.run(prompt)
    assert (raised.value.kind, raised.value.node) == (kind, node_id(prompt, class_type))


def released_graph(comfy: Comfy) -> dict[str, Any]:
    """A graph as older workflows have it: two widgets in the first loader, the other latent node, KSampler."""
    graph = load("sana_1k")
    for node in graph["nodes"]:
        if node["type"] == "SanaCheckpointLoader":
            node["widgets_values"] = [BUNDLED, "SanaMS_1600M_P1_D20"]
        elif node["type"] == "EmptySanaLatentImage":
            node["type"] = "EmptyDCAELatentImage"
        elif node["type"] == "GemmaTextEncode":
            node["type"] = "SanaTextEncode"
        elif node["type"] == "SanaSampler":
            node["type"] = "KSampler"
            node["widgets_values"] = [9, "randomize", 4, 1.0, "euler", "normal", 1.0]
        elif node["type"] == "ExtraVAELoader":
            node["widgets_values"] = [BUNDLED, KIND, "fp32"]
        elif node["type"] == "GemmaLoader":
            node["widgets_values"] = [BUNDLED, "cpu", "default"]
        elif node["type"] == "SanaResolutionSelect":
            node["widgets_values"] = ["256px", "1.00"]
    return to_prompt(graph, comfy.nodes)


def test_a_released_graph_runs_with_ksampler(comfy_with_models: Comfy, pipeline: SanaPipeline) -> None:
    prompt = released_graph(comfy_with_models)
    del entry(prompt, "SanaCheckpointLoader")["dtype"]  # a prompt of the API may lack it as well
    made = picture(comfy_with_models, prompt)
    text = next(one["inputs"]["text"] for one in prompt.values() if one["class_type"] == "SanaTextEncode")
    options: dict[str, Any] = {"sampler": "flow_euler", "guidance_scale": 1.0, "num_inference_steps": 4, "seed": 9}
    judged = pipeline(text, 256, 256, use_resolution_binning=False, output_type="np", progress_bar=False, **options)
    torch.testing.assert_close(made, torch.from_numpy(judged), rtol=0, atol=1e-4)


def test_a_link_of_the_wrong_type_is_refused(comfy: Comfy) -> None:
    prompt = with_bundled_model(to_prompt(load("sana_1k"), comfy.nodes))
    entry(prompt, "SanaSampler")["negative"] = entry(prompt, "SanaSampler")["latent_image"]
    with pytest.raises(PromptError, match="return_type_mismatch"):
        comfy.executor.run(prompt)


@pytest.mark.parametrize("name", ALL)
def test_the_file_is_a_graph_that_the_page_can_show(comfy: Comfy, name: str) -> None:
    graph = load(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["version"] == 0.4
    assert (graph["last_node_id"], graph["last_link_id"]) == (max(nodes), max(link[0] for link in graph["links"]))
    for link, start, slot, end, place, kind in graph["links"]:
        output, given = nodes[start]["outputs"][slot], nodes[end]["inputs"][place]
        assert link in output["links"] and given["link"] == link
        assert output["type"] == given["type"] == kind
        cls: Any = comfy.nodes[nodes[start]["type"]]
        assert cls.RETURN_TYPES[slot] == kind
        assert output["name"] == getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)[slot]
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in itertools.combinations(boxes, 2):
        apart = x + width <= other_x or other_x + other_width <= x
        title = 30  # above each position
        assert apart or y + height + title <= other_y or other_y + other_height + title <= y


def test_every_workflow_is_tested() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(ALL)
