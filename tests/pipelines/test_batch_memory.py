"""What a run's options make of a pipeline: stand-ins record the calls; the plan itself is that of the tiny model."""

from types import SimpleNamespace

import pytest
import torch

from sana.pipelines.batch_memory import apply_settings, plan_memory, planned_options
from sana.pipelines.inputs import ImageSize
from sana.pipelines.memory.stages import MemoryModel
from sana.pipelines.options import InferenceOptions
from sana.pipelines.plan import MemoryLimitError
from sana.pipelines.plan_stages import make_tiling
from sana.pipelines.sana_pipeline import SanaPipeline

SMALL, LARGE, WIDE = ImageSize(64, 64, 64, 64), ImageSize(256, 128, 256, 128), ImageSize(32, 512, 32, 512)


class StandIn:
    """A pipeline that remembers what it was told, in order."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.told: list[tuple] = []
        self.autoencoder = SimpleNamespace(
            enable_tiling=lambda *sides: self.told.append(("tiles", *sides)),
            disable_tiling=lambda: self.told.append(("no tiles",)),
        )

    def quantize(self, **schemes: str | None) -> None:
        self.told.append(("quantize", schemes["transformer"], schemes["text_encoder"]))

    def disable_offload(self) -> None:
        self.told.append(("no offload",))

    def enable_model_cpu_offload(self) -> None:
        self.told.append(("model",))

    def enable_sequential_cpu_offload(self) -> None:
        self.told.append(("sequential",))

    def enable_group_offload(self) -> None:
        self.told.append(("group",))

    def plan(self, height: int, width: int, batch: int, **options: object) -> str:
        self.told.append(("plan", height, width, batch, options))
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, []),
        ({"quantization": "none", "offload": "none"}, [("no offload",)]),
        ({"quantization": "int8"}, [("quantize", "int8", None)]),
        ({"quantization": "fp8", "text_quantization": "nf4"}, [("quantize", "fp8", "nf4")]),
        ({"offload": "model"}, [("model",)]),
        ({"offload": "sequential"}, [("sequential",)]),
        ({"offload": "group", "vae_tiling": True}, [("group",), ("tiles",)]),
        ({"vae_tiling": 512}, [("tiles", 512, 512, 512, 512)]),
        ({"vae_tiling": False}, [("no tiles",)]),
    ],
)
def test_each_option_reaches_the_call_of_its_name(options, told):
    pipeline = StandIn()
    apply_settings(pipeline, InferenceOptions(**options), None)
    assert pipeline.told == told


def test_the_plan_is_for_the_largest_picture_and_as_many_as_one_call_may_hold():
    pipeline = StandIn()
    options = InferenceOptions(max_vram="1GB", bs=8, pag_scale=2.0, offload="model", vae_tiling=128)
    with pytest.raises(KeyboardInterrupt):
        plan_memory(pipeline, options, [SMALL, LARGE, SMALL, WIDE, SMALL])
    ((_, height, width, batch, asked),) = pipeline.told
    assert (height, width, batch) == (256, 128, 3)
    assert (asked["max_vram"], asked["pag"], asked["guidance"]) == ("1GB", True, None)
    assert (asked["offload"], asked["tiling"], asked["quantization"]) == ("model", 128, "auto")


def test_an_ablation_is_planned_with_the_values_that_need_most():
    for values, guidance, pag in (([1.0], False, False), ([1.0, 2.0], None, False)):
        pipeline = StandIn()
        options = InferenceOptions(max_vram="1GB", ablation_key="cfg_scale", ablation_selections=values)
        with pytest.raises(KeyboardInterrupt):
            plan_memory(pipeline, options, [SMALL])
        assert (pipeline.told[0][4]["guidance"], pipeline.told[0][4]["pag"]) == (guidance, pag)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"offload": "model"}, "has no effect with device cpu"), ({"quantization": "int4"}, "does not run on cpu")],
)
def test_what_the_device_cannot_do_is_said_before_weights_are_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(StandIn("cpu"), InferenceOptions(**options), [SMALL])


@pytest.fixture
def unloaded(model_folder) -> SanaPipeline:
    from sana.pipelines import loading

    return SanaPipeline(loading.source_config(loading.find_model(model_folder)), device="cpu")


def test_a_plan_becomes_options_that_the_recipes_name(unloaded):
    options = InferenceOptions(max_vram="1GB", bs=2, device="cpu")
    plan = plan_memory(unloaded, options, [SMALL, SMALL])
    planned = planned_options(options, plan)
    assert planned.bs == plan.settings.batch <= 2
    assert (planned.quantization, planned.text_quantization, planned.offload) == ("none", "none", "none")
    assert planned.vae_tiling == (plan.settings.tile or False)
    assert planned_options(options, None) is options
    assert unloaded.transformer is None and unloaded._text_encoder is None and unloaded._autoencoder is None


def test_what_does_not_fit_is_refused_before_weights_are_loaded(unloaded):
    with pytest.raises(MemoryLimitError):
        plan_memory(unloaded, InferenceOptions(max_vram="1kB"), [SMALL])
    assert unloaded.transformer is None and unloaded._text_encoder is None and unloaded._autoencoder is None


def test_a_start_from_a_small_picture_is_planned_with_its_encoding(unloaded):
    """The encoder needs more than the decoder: what the picture alone fits into gets tiles, and less is refused."""
    large, factor = ImageSize(512, 512, 512, 512), unloaded.config.vae.vae_downsample_rate
    model = MemoryModel(unloaded.config, device="cpu", dtype=torch.float32)
    plain = plan_memory(unloaded, InferenceOptions(max_vram="10GB"), [large])
    kept = 4 * (3 * 64 * 64 + unloaded.config.vae.vae_latent_dim * (512 // factor) ** 2)  # small picture, latents
    encoding = plain.stages[-1].resident + model.encode(512, 512, 1) + kept
    assert plain.peak < encoding and plain.settings.tile is None
    limit = f"{encoding - 1}B"
    upscaled = plan_memory(unloaded, InferenceOptions(max_vram=limit, upscale_from=64), [large])
    assert upscaled.settings.tile is not None
    tiles, stages = make_tiling(upscaled.settings.tile), {stage.name: stage for stage in upscaled.stages}
    assert stages["encoding"].peak == model.encode(512, 512, 1, tiling=tiles) + kept
    assert stages["encoding"].total < encoding
    less = f"{model.encode(512, 512, 1)}B"  # nothing is left for weights
    with pytest.raises(MemoryLimitError, match="encoding needs"):
        plan_memory(unloaded, InferenceOptions(max_vram=less, upscale_from=64, vae_tiling=False), [large])
