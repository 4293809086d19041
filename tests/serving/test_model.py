"""What a server opens: options that cannot take effect, and plans that hold for everything that may be in work."""

import inspect
from dataclasses import replace

import pytest

from sana.config import load_config
from sana.pipelines import batch, inputs
from sana.pipelines.options import InferenceOptions
from sana.pipelines.plan import MemoryLimitError
from sana.serving import model
from sana.serving.evaluation import Evaluator
from sana.serving.settings import ServerSettings
from tests.serving.conftest import BUNDLED

SETTINGS = ServerSettings(max_active=4)


def options(**more) -> InferenceOptions:
    return InferenceOptions(model_path=str(BUNDLED), device="cpu", **more)


@pytest.mark.parametrize(("more", "said"), [({"compile": "graph"}, "compile"), ({"upscale_from": 128}, "upscale_from")])
def test_what_the_server_cannot_do_is_one_sentence(more, said):
    with pytest.raises(ValueError, match=f"^{said} cannot take effect in the server: .*\\.$"):
        model.open_model(options(**more), SETTINGS)


def test_a_plan_that_fits_is_applied_and_the_settings_stay():
    pipeline, settings = model.open_model(options(max_vram="2GB"), SETTINGS, lower=True)
    assert settings == SETTINGS and pipeline.transformer is not None and pipeline.offload == "none"


@pytest.mark.slow
def test_fewer_pictures_are_in_work_where_that_was_left_open_else_it_is_refused():
    """The limit is what one exact picture needs at least, which the refusal of too little tells."""
    pipeline, _ = batch.name_pipeline(options())
    exact = {"quantization": "none", "text_quantization": "none", "vae_tiling": False}
    with pytest.raises(
        MemoryLimitError, match=r"^One picture in work .* use more memory, a lower --max_pixels"
    ) as refused:
        one = replace(SETTINGS, max_active=1)
        model.plan_serving(pipeline, options(max_vram="40MB", **exact), one, lower=False)
    least = refused.value.needed
    enough = options(max_vram=f"{least}B", **exact)
    plan, active = model.plan_serving(pipeline, enough, SETTINGS, lower=True)
    assert active == 1 and plan.request.margin_bytes + plan.peak <= least
    with pytest.raises(MemoryLimitError, match=r"^4 pictures in work of the largest .* --max_active=1 does\.$") as four:
        model.plan_serving(pipeline, enough, SETTINGS, lower=False)
    assert four.value.needed > least == four.value.allowed


def test_tiles_of_the_decoder_are_taken_or_planned():
    pipeline, _ = model.open_model(options(vae_tiling=128), SETTINGS)
    assert pipeline.autoencoder.tiling.height == 128
    pipeline, _ = model.open_model(options(vae_tiling=128, max_vram="2GB"), SETTINGS)
    assert pipeline.autoencoder.tiling.height == 128
    with pytest.raises(ValueError, match="vae_tiling needs the side of a tile beside max_vram"):
        options(vae_tiling=True, max_vram="2GB")


@pytest.mark.parametrize("config", ["512ms/Sana_600M_img512.yaml", "1024ms/Sana_1600M_img1024.yaml"])
def test_no_size_that_a_client_may_ask_for_is_larger_than_the_planned_one(config):
    config = load_config(f"configs/sana_config/{config}")
    own, factor = config.model.image_size, config.vae.vae_downsample_rate
    for settings in (ServerSettings(), ServerSettings(max_pixels=own**2 // 2), ServerSettings(max_aspect=1.5)):
        largest = model.largest_size(config, settings)
        most = settings.pixels(own)
        for height in range(factor, int((most * settings.max_aspect) ** 0.5), 97):
            width = min(most // height, int(height * settings.max_aspect))
            if width * settings.max_aspect < height or width < factor:
                continue
            size = inputs.plan_size(height, width, factor=factor, image_size=own, binning=True)
            assert size.model_height * size.model_width <= largest.model_height * largest.model_width


def test_what_is_held_between_steps_grows_with_pictures_and_is_more_where_they_are_joined():
    config = load_config("configs/sana_config/1024ms/Sana_1600M_img1024.yaml")
    size = model.largest_size(config, SETTINGS)

    def held(pictures: int) -> dict[str, int]:
        return model.held_bytes(config, SETTINGS, size, pictures=pictures, branches=2, itemsize=2)

    keys_and_values = 2 * 20 * 2240 * 300 * 2  # of 20 blocks of width 2240 for 300 tokens, in two bytes each
    assert held(5)["cpu"] - held(4)["cpu"] >= 2 * keys_and_values
    assert held(4)["joined"] - held(4)["cpu"] >= 4 * 4 * 2 * keys_and_values  # four groups of joined texts are kept


def test_the_rows_of_one_forward_are_those_of_the_evaluator():
    assert inspect.signature(Evaluator).parameters["max_rows"].default == model.JOINED_ROWS
