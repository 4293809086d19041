"""What every stage holds under given settings, by hand and against the memory model's own run of a batch."""

from typing import Any

import pytest
import torch

from sana.config import SanaConfig
from sana.models.layers.residency import Mover, as_kind, slots_below
from sana.models.layers.schedule import Residency
from sana.pipelines import loading
from sana.pipelines.memory.stages import MemoryModel
from sana.pipelines.offload_units import units_of
from sana.pipelines.options import BUNDLED_MODEL
from sana.pipelines.plan_request import PlanRequest, make_job
from sana.pipelines.plan_stages import (
    DECODE,
    DENOISE,
    ENCODE,
    TEXT,
    Estimator,
    Settings,
    Stage,
    kept_by_offload,
    make_tiling,
)
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.pipelines.plan_stand_in import M, Maker, large_config

TEXT_ENCODER, TRANSFORMER, AUTOENCODER = "text_encoder", "transformer", "autoencoder"


@pytest.fixture
def estimate() -> Estimator:
    return Estimator(make_job(large_config(), PlanRequest()), Maker())


def test_all_networks_stay_without_offload(estimate: Estimator):
    for name, peak in ((TEXT, 100), (DENOISE, 200), (DECODE, 3000)):
        stage = estimate.stage(name, Settings())
        assert stage == Stage(name, {TEXT_ENCODER: 5000 * M, TRANSFORMER: 3000 * M, AUTOENCODER: 1000 * M}, peak * M)
        assert (stage.resident, stage.total) == (9000 * M, (9000 + peak) * M)
    assert estimate.host(Settings()) == 0
    assert estimate.worst(Settings()).name == DECODE


@pytest.mark.parametrize(
    ("offload", "text", "transformer", "autoencoder"),
    [("model", 5000, 3000, 1000), ("group", 1800, 1200, 1000), ("sequential", 1400, 1100, 600)],
)
def test_offload_keeps_a_part_of_the_running_network(
    estimate: Estimator, offload: str, text: int, transformer: int, autoencoder: int
):
    held = [estimate.resident(name, Settings(offload=offload)) for name in (TEXT, DENOISE, DECODE)]
    assert held == [{TEXT_ENCODER: text * M}, {TRANSFORMER: transformer * M}, {AUTOENCODER: autoencoder * M}]
    assert estimate.host(Settings(offload=offload)) == 9000 * M


def test_quantisation_concerns_its_own_network(estimate: Estimator):
    chosen = Settings(quantization="int8", text_quantization="nf4")
    held = {TEXT_ENCODER: 1250 * M, TRANSFORMER: 1500 * M, AUTOENCODER: 1000 * M}
    assert estimate.resident(DENOISE, chosen) == held


def test_a_small_picture_that_comes_first_is_encoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sana.pipelines.plan_stages.pack_budget", lambda: 10**12)
    job = make_job(large_config(), PlanRequest(device="cpu", upscale_from=512))
    estimate = Estimator(job, Maker())
    assert estimate.stages == (TEXT, ENCODE, DENOISE, DECODE) and job.small == (512, 512)
    beside = 4 * (3 * 512 * 512 + 32 * 32 * 32)  # of each picture: the small one, and latents of the large one
    for settings, peak in ((Settings(batch=2), 3500), (Settings(tile=256), 500 + 200 + 512)):
        assert estimate.peak(ENCODE, settings) == peak * M + settings.batch * beside
    sums = [sum(estimate.resident(name, Settings(packing=True)).values()) // M for name in estimate.stages]
    assert sums == [9000, 11000, 11000, 11000], "the small picture has used every network"
    assert estimate.resident(ENCODE, Settings(offload="model")) == {AUTOENCODER: 1000 * M}
    assert estimate.host(Settings(offload="model")) == 9000 * M


def test_packed_copies_are_made_when_a_network_first_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sana.pipelines.plan_stages.pack_budget", lambda: 1800 * M)
    estimate = Estimator(make_job(large_config(), PlanRequest(device="cpu")), Maker())
    sums = [sum(estimate.resident(name, Settings(packing=True)).values()) // M for name in (TEXT, DENOISE, DECODE)]
    assert sums == [9000, 10500, 10800], "1500 M of the transformer, then what the budget leaves of 500 M"
    assert sum(estimate.resident(DECODE, Settings()).values()) == 9000 * M


def test_without_a_text_encoder_there_is_no_such_stage():
    estimate = Estimator(make_job(large_config(), PlanRequest(text_encoder=False)), Maker())
    assert estimate.stages == (DENOISE, DECODE)
    assert estimate.resident(DENOISE, Settings()) == {TRANSFORMER: 3000 * M, AUTOENCODER: 1000 * M}
    assert estimate.host(Settings(offload="model")) == 4000 * M


def test_numbers_are_computed_once():
    maker = Maker()
    estimate = Estimator(make_job(large_config(), PlanRequest()), maker)
    for offload in ("none", "model", "none"):
        estimate.all_stages(Settings(offload=offload))
    estimate.all_stages(Settings(quantization="int8"))
    asked = [one for one in maker.asked if one[0] != "weights"]
    assert [one[0] for one in asked] == ["encode_text", "denoise", "decode", "denoise"]


def test_another_size_has_its_own_numbers_where_it_matters():
    maker = Maker()
    estimate = Estimator(make_job(large_config(), PlanRequest()), maker)
    other = estimate.for_job(make_job(large_config(), PlanRequest(height=512, width=512, use_resolution_binning=False)))
    for name, ratio in ((TEXT, 1), (DENOISE, 4), (DECODE, 4)):
        assert estimate.peak(name, Settings()) == ratio * other.peak(name, Settings())
    assert len(maker.made) == 1
    assert [one[0] for one in maker.asked] == ["encode_text", "denoise", "denoise", "decode", "decode"]


def bundled_config() -> SanaConfig:
    return loading.source_config(loading.find_model(BUNDLED_MODEL))


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("batch", [2, 5])
def test_pictures_decoded_one_by_one_need_what_the_memory_model_finds_for_the_batch(tile: int | None, batch: int):
    config = bundled_config()
    config.vae.weight_dtype = "bfloat16"
    request = PlanRequest(device="cpu", batch=batch, height=256, width=192, use_resolution_binning=False)
    model = MemoryModel(config, device="cpu", dtype=torch.float32)
    estimate = Estimator(make_job(config, request), lambda *_: model)
    ours = estimate.peak(DECODE, Settings(batch=batch, tile=tile))
    whole = model.decode(256, 192, batch, tiling=None if tile is None else make_tiling(tile))
    assert abs(ours - whole) <= 0.02 * whole
    assert ours > estimate.peak(DECODE, Settings(batch=1, tile=tile))


class Counted(Mover):
    """Brings copies that stay on the CPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), pin=False)

    def fetch(self, home: torch.Tensor) -> torch.Tensor:
        return as_kind(home.clone(), home)


def run(pipeline: SanaPipeline, name: str) -> None:
    """One use of a network."""
    network: Any = getattr(pipeline, name)
    if name == "text_encoder":
        network.encode(["a cat"], chi=True, trim=True)
    elif name == "autoencoder":
        network.decode(torch.zeros(1, network.latent_channels, 2, 2))
        network.encode(torch.zeros(1, 3, 64, 64))
    else:
        channels, width = pipeline.config.vae.vae_latent_dim, pipeline.config.text_encoder.caption_channels
        latents, text = torch.zeros(1, channels, 2, 2), torch.zeros(1, 1, 5, width)
        network(latents, torch.zeros(1), text, mask=torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("offload", ["sequential", "group"])
@pytest.mark.parametrize("name", [TEXT_ENCODER, TRANSFORMER, AUTOENCODER])
def test_a_running_network_holds_what_is_planned(pipeline: SanaPipeline, name: str, offload: str):
    """Counts the copies that the pipeline's own offload makes of the weights while a network runs."""
    network: Any = getattr(pipeline, name)
    model = MemoryModel(pipeline.config, device="cpu", dtype=torch.float32)
    residency = Residency(network, units_of(name, network))
    residency.offload(Counted(), group=1, prefetch=offload == "group")
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(slot.home.nbytes for slot in slots_below(network) if slot.resident))

    watched = list((network.model if name == TEXT_ENCODER else network).modules())
    handles = [module.register_forward_pre_hook(look) for module in watched]
    handles += [module.register_forward_hook(look) for module in watched]
    try:
        with torch.no_grad(), residency.use():
            run(pipeline, name)
    finally:
        residency.offload(None)
        residency.close()
        for handle in handles:
            handle.remove()
    assert most == kept_by_offload(model.weights(name), offload)
