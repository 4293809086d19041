"""What offload keeps on the device: by hand, and against the tensors that the pipeline's own offload brings."""

from pathlib import Path

import pytest
import torch

from sana.models.layers.residency import Mover, slots_below
from sana.models.layers.schedule import Residency
from sana.pipelines.offload_units import units_of
from sana.pipelines.plan_residency import Cut, OffloadModel, cut
from sana.pipelines.sana_pipeline import SanaPipeline

NETWORKS = ("text_encoder", "transformer", "autoencoder")


def test_held_by_hand():
    assert Cut((10, 1, 2, 10), 100).held("sequential") == 110
    assert Cut((10, 1, 2, 10), 100).held("group") == 112, "the last unit and the first, which comes next"


class Counted(Mover):
    """Brings copies that stay on the CPU, and counts those that are there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), pin=False)

    def fetch(self, home: torch.Tensor) -> torch.Tensor:
        return home.clone()


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_running_network_holds_no_more_than_planned(model_folder: Path, name: str, prefetch: bool):
    """Runs every network under the offload that the pipeline has, on copies that stay on the CPU."""
    pipeline = SanaPipeline.from_pretrained(model_folder, device="cpu")
    network = getattr(pipeline, name)
    planned = cut(name, network.model if name == "text_encoder" else network)
    residency = Residency(network, units_of(name, network))
    residency.offload(Counted(), group=1, prefetch=prefetch)
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(slot.home.nbytes for slot in slots_below(network) if slot.resident))

    watched = network.model if name == "text_encoder" else network
    handles = [module.register_forward_pre_hook(look) for module in watched.modules()]
    handles += [module.register_forward_hook(look) for module in watched.modules()]
    with torch.no_grad(), residency.use():
        if name == "transformer":
            dtype = next(network.parameters()).dtype
            channels, width = pipeline.config.vae.vae_latent_dim, pipeline.config.text_encoder.caption_channels
            latents, text = torch.zeros(1, channels, 2, 2, dtype=dtype), torch.zeros(1, 1, 5, width, dtype=dtype)
            network(latents, torch.zeros(1), text, mask=torch.ones(1, 5, dtype=torch.long))
        elif name == "autoencoder":
            network.decode(torch.zeros(1, network.latent_channels, 2, 2))
        else:
            network.encode(["a cat"], chi=True, trim=True)
    assert most == planned.held("group" if prefetch else "sequential")
    residency.close()
    for handle in handles:
        handle.remove()


def test_the_model_holds_all_or_the_cut(model_folder: Path):
    pipeline = SanaPipeline.from_pretrained(model_folder, device="cpu")
    model = OffloadModel(pipeline.config, device="cpu", dtype=torch.float32)
    for name in NETWORKS:
        network = getattr(pipeline, name)
        exact = cut(name, network.model if name == "text_encoder" else network)
        assert model.held(name, "group") == exact.held("group")
        assert model.held(name, "sequential") == exact.held("sequential")
        assert model.held(name, "model") == model.weights(name).total > model.held(name, "sequential")


def test_without_packed_copies_none_are_counted_and_products_make_their_own(model_folder: Path):
    config = SanaPipeline.from_pretrained(model_folder, device="cpu").config
    models = [OffloadModel(config, device="cpu", dtype=torch.float32, packing=packing) for packing in (True, False)]
    assert [model.weights("transformer").packed > 0 for model in models] == [True, False]
    assert models[0].denoise(64, 64, 1) <= models[1].denoise(64, 64, 1)
