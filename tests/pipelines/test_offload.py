"""Offload: the same pictures, bit for bit, in bounded memory, on a stand-in and on CUDA; what does not go with it."""

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sana.models.layers.residency import Mover, slots_below
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.offload import _Offload
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.sprint import SanaSprintPipeline
from tests.models.layers.stand_in import StandIn
from tests.parity.runners.pipeline import build_pipeline
from tests.pipelines.offloaded import BUNDLED, CALL, KINDS, put_away
from tests.tiny_model import recorded_case

pytestmark = pytest.mark.usefixtures("unpacked")


def bytes_of(pipeline: SanaPipeline) -> dict[str, dict[str, int]]:
    """Bytes of each network: `total`, `unit` (the largest), `rest`; counted from shapes and names."""
    transformer, encoder, autoencoder = pipeline.transformer, pipeline.text_encoder.model, pipeline.autoencoder
    parts = [autoencoder.encoder, autoencoder.decoder]
    units: dict[str, list[nn.Module]] = {
        "transformer": list(transformer.blocks),
        "text_encoder": [encoder.embed_tokens, *encoder.layers],
        "autoencoder": [unit for part in parts for unit in (part.project_in, *part.stages, part.project_out)],
    }
    networks = {"transformer": transformer, "text_encoder": encoder, "autoencoder": autoencoder}
    found = {}
    for name, network in networks.items():
        tables = sum(block.scale_shift_table.nbytes for block in units[name] if hasattr(block, "scale_shift_table"))
        unread = network.pos_embed.nbytes + network.y_embedder.y_embedding.nbytes if name == "transformer" else 0
        total, sizes = _size(network) - unread, [_size(unit) for unit in units[name]]
        found[name] = {"total": total, "unit": max(sizes), "rest": total - sum(sizes) + tables}
    return found


def _size(module: nn.Module) -> int:
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def assert_away(pipeline: SanaPipeline) -> None:
    for network in (pipeline.transformer, pipeline._text_encoder, pipeline._autoencoder):
        assert not any(slot.resident for slot in slots_below(network))
        for parameter in network.parameters():
            assert parameter.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"pag_scale": 2.0, "interval_guidance": (0.2, 1.0)}, {"guidance_scale": 1.0}])
def test_the_same_picture_in_bounded_memory(plain, open_pipeline, kind, options):
    wanted = plain(**CALL, **options)
    sizes, pipeline = bytes_of(plain), open_pipeline()
    mover = put_away(pipeline, kind)
    for _ in range(2):
        assert torch.equal(pipeline(**CALL, **options), wanted)
        gc.collect()
        assert mover.resident == 0
        assert_away(pipeline)
    at_once = {"model": math.inf, "sequential": 1, "group": 2, "group of two": 4, "group without stream": 1}[kind]
    bound = max(min(one["total"], one["rest"] + at_once * one["unit"]) for one in sizes.values())
    assert mover.peak <= bound < sum(one["total"] for one in sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sprint_model(kind):
    sprint = build_pipeline(recorded_case("e2e/sprint_2"), SanaSprintPipeline)
    call = {**CALL, "num_inference_steps": 2, "height": 64, "width": 64, "use_resolution_binning": False}
    wanted = sprint(**call)
    mover = put_away(sprint, kind)
    for _ in range(2):
        assert torch.equal(sprint(**call), wanted) and mover.resident == 0


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_after_an_error_in_the_middle(plain, open_pipeline, kind):
    class StopError(Exception):
        pass

    def stop(pipe, step, time, tensors):
        raise StopError

    pipeline = open_pipeline()
    mover = put_away(pipeline, kind)
    with pytest.raises(StopError):
        pipeline(**CALL, callback_on_step_end=stop)
    gc.collect()
    assert mover.resident == 0
    assert torch.equal(pipeline(**CALL), plain(**CALL))


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_tiles_and_encoding(plain, open_pipeline, kind):
    pipeline = open_pipeline()
    mover = put_away(pipeline, kind)
    factor = plain.vae.downsample_factor
    images = torch.rand(1, 3, 4 * factor, 3 * factor) * 2 - 1
    sizes = [factor] * 4
    results = []
    for one in (plain, pipeline):
        one.vae.enable_tiling(*sizes)
        with one.stage("autoencoder"), torch.inference_mode():
            latents = one.vae.encode(images)
        results.append((latents, one.decode(latents)))
        one.vae.disable_tiling()
    (latents, decoded), (same_latents, same) = results
    assert torch.equal(latents, same_latents) and torch.equal(decoded, same)
    gc.collect()
    assert mover.resident == 0


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_a_broken_network_is_named(open_pipeline, kind):
    pipeline = open_pipeline()
    pipeline.vae.decoder.stages[0].op_list[-1].main.conv1.conv.weight.fill_(math.inf)
    put_away(pipeline, kind)
    with pytest.raises(NonFiniteError, match="autoencoder's decoder .* layer 'stages.0"):
        pipeline(**CALL)


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_texts_are_remembered(open_pipeline, kind):
    """The encoder moves once for what is new, and not at all for what is known, prefix and null caption included."""
    pipeline = open_pipeline()
    mover = put_away(pipeline, kind)
    for prompt, moves in (("a cat", True), ("a dog", True), ("a cat", False)):
        mover.restart()
        pipeline.encode_prompts([prompt])
        assert (mover.fetched > 0) == moves
        prefix = pipeline.text_encoder._prefix
        pipeline.text_encoder.encode([prompt])
        assert pipeline.text_encoder._prefix is prefix
    assert len(pipeline.text_features) == 2 and mover.resident == 0


def test_networks_that_come_later_are_put_away_at_once(plain, open_pipeline, model_folder):
    pipeline = SanaPipeline(plain.config, device="cpu")
    mover = put_away(pipeline, "sequential")
    pipeline.from_pretrained(model_folder)
    assert torch.equal(pipeline(**CALL), plain(**CALL))
    assert_away(pipeline)
    old, pipeline.autoencoder = pipeline.autoencoder, copy.deepcopy(plain.autoencoder)
    assert not any(parameter.isnan().any() for parameter in old.parameters())  # it is its own again
    assert_away(pipeline)
    pipeline.transformer = pipeline.transformer
    pipeline.from_pretrained(model_folder)
    assert torch.equal(pipeline(**CALL), plain(**CALL)) and mover.resident == 0


def test_where_networks_are_loaded(open_pipeline):
    pipeline = open_pipeline()
    assert (pipeline.offload, pipeline.load_device) == ("none", torch.device("cpu"))
    pipeline.__dict__["device"] = torch.device("meta")  # stands for a GPU
    assert pipeline.load_device == torch.device("meta")
    pipeline.__dict__["_offload"] = _Offload("model", StandIn())
    assert (pipeline.offload, pipeline.load_device) == ("model", torch.device("cpu"))


def test_it_can_be_changed_and_ended(plain, open_pipeline):
    pipeline, wanted = open_pipeline(), plain(**CALL)
    for kind in ("group", "model", "sequential"):
        put_away(pipeline, kind)
        assert pipeline.offload == KINDS[kind].kind and torch.equal(pipeline(**CALL), wanted)
    pipeline.disable_offload()
    assert pipeline.offload == "none" and torch.equal(pipeline(**CALL), wanted)
    assert next(slots_below(pipeline.transformer), None) is None
    pipeline.disable_offload()
    pipeline.to(torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16


def test_the_weights_are_hashed_as_they_are(plain, open_pipeline):
    pipeline = open_pipeline()
    pipeline._change(_Offload("sequential", Mover(torch.device("cpu")), 1))
    assert pipeline.weights_hash() == plain.weights_hash()


def test_moving_an_offloaded_pipeline(open_pipeline):
    pipeline = open_pipeline()
    put_away(pipeline, "model")
    assert pipeline.to("cpu").to(torch.float32).device == torch.device("cpu")
    with pytest.raises(ValueError, match="keeps its dtype torch.float32"):
        pipeline.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"call disable_offload\(\) before another device"):
        pipeline.device = torch.device("meta")
    with pytest.raises(ValueError, match=r"call disable_offload\(\) first"):
        pipeline.transformer.to("meta")
    assert (pipeline.device, pipeline.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_on_a_cpu_it_is_refused_with_what_helps(open_pipeline, enable):
    pipeline = open_pipeline()
    with pytest.raises(ValueError, match=r"computes on the CPU.*mmap.*enable_tiling\(\)"):
        getattr(pipeline, enable)()
    assert pipeline.offload == "none" and torch.isfinite(pipeline(**CALL)).all()


def test_arguments_of_group_offload(open_pipeline):
    with pytest.raises(ValueError, match="num_blocks_per_group must be at least 1, not 0"):
        open_pipeline().enable_group_offload(0)
    with pytest.raises(ValueError, match="The device cuda:77 is not there"):
        open_pipeline().enable_group_offload(device="cuda:77")
    with pytest.raises(ValueError, match="use_stream needs a CUDA device, not meta"):
        open_pipeline().enable_group_offload(device="meta")


class Compiled:
    """What `compile(mode)` leaves in a pipeline."""

    def __init__(self, mode: str) -> None:
        self.settings = type("Settings", (), {"mode": mode})

    def drop_graphs(self) -> None:
        pass


@pytest.mark.parametrize("mode", ["graph", "max", "regional"])
def test_compiling_and_moving_weights_exclude_each_other(open_pipeline, mode):
    compiled, sequential, cast = open_pipeline(), open_pipeline(), open_pipeline()
    compiled._compiled = Compiled(mode)
    with pytest.raises(ValueError, match=rf"sequential offload moves weights that compile\('{mode}'\) wants"):
        compiled.enable_sequential_cpu_offload(device="meta")
    with pytest.raises(ValueError, match="layerwise casting moves weights"):
        compiled.enable_layerwise_casting()
    put_away(sequential, "sequential")
    cast.enable_layerwise_casting()
    for pipeline, what in ((sequential, "sequential offload"), (cast, "layerwise casting")):
        with pytest.raises(ValueError, match=rf"compile\('{mode}'\) wants weights .* {what} moves them"):
            pipeline._compiled = Compiled(mode)
        assert pipeline._compiled is None
        pipeline._compiled = Compiled("off")


@pytest.mark.parametrize("mode", ["graph", "max"])
def test_graphs_do_not_go_with_whole_networks_either(open_pipeline, mode):
    pipeline = open_pipeline()
    put_away(pipeline, "model")
    with pytest.raises(ValueError, match="model offload moves them"):
        pipeline._compiled = Compiled(mode)


def test_blocks_may_be_compiled_where_whole_networks_move(plain, open_pipeline):
    pipeline = open_pipeline()
    mover = put_away(pipeline, "model")
    call = {**CALL, "prompt": "a cat", "num_inference_steps": 2}
    pipeline.compile("regional", backend="eager")
    torch.testing.assert_close(pipeline(**call), plain(**call), rtol=1e-4, atol=1e-4)
    gc.collect()
    assert mover.resident == 0


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_quantised_networks_come_and_go(open_pipeline, kind, scheme):
    pytest.importorskip("torchao")
    pipeline = open_pipeline()
    before = open_pipeline()
    for one in (pipeline, before):
        one.quantize(scheme, scheme)
    wanted = pipeline(**CALL)
    mover = put_away(pipeline, kind)
    assert torch.equal(pipeline(**CALL), wanted) and mover.resident == 0
    later = open_pipeline()
    put_away(later, kind)
    assert later.text_encoder is later._text_encoder
    later.quantize(scheme, scheme)
    assert torch.equal(later(**CALL), wanted)


def test_a_network_is_changed_at_home(plain, open_pipeline):
    pipeline = open_pipeline()
    put_away(pipeline, "sequential")
    with pipeline.detached("transformer"):
        assert next(slots_below(pipeline.transformer), None) is None
        for parameter in pipeline.transformer.final_layer.parameters():
            parameter.zero_()
    assert pipeline.transformer.final_layer.linear.weight.isnan().all()
    changed = copy.deepcopy(plain)
    for parameter in changed.transformer.final_layer.parameters():
        parameter.zero_()
    assert torch.equal(pipeline(**CALL), changed(**CALL))
    with plain.detached("transformer"):
        pass
    pipeline.enable_layerwise_casting()
    with pytest.raises(ValueError, match="is stored by layerwise casting"), pipeline.detached("transformer"):
        pass


@pytest.fixture
def on_cuda(model_folder) -> Callable[[], SanaPipeline]:
    return lambda: SanaPipeline.from_pretrained(model_folder, device="cuda", dtype="fp32")


ENABLE = {
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(),
    "sequential": lambda pipeline: pipeline.enable_sequential_cpu_offload(),
    "group": lambda pipeline: pipeline.enable_group_offload(),
    "group, low memory": lambda pipeline: pipeline.enable_group_offload(2, low_cpu_mem_usage=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ENABLE)
def test_the_same_picture_on_cuda(on_cuda, kind):
    pipeline, wanted = on_cuda(), on_cuda()(**CALL, pag_scale=2.0)
    assert ENABLE[kind](pipeline) is pipeline
    for _ in range(2):
        assert torch.equal(pipeline(**CALL, pag_scale=2.0), wanted)
        for network in (pipeline.transformer, pipeline._text_encoder, pipeline._autoencoder):
            assert all(parameter.device.type == "cpu" for parameter in network.parameters())
    assert pipeline.load_device.type == "cpu" and pipeline.vae.encoder.project_in is not None
    pipeline.disable_offload()
    assert torch.equal(pipeline(**CALL, pag_scale=2.0), wanted)
    assert all(parameter.is_cuda for parameter in pipeline.transformer.parameters())


@pytest.mark.gpu
def test_a_pipeline_of_the_cpu_gets_a_gpu_without_its_weights(model_folder):
    pipeline = SanaPipeline.from_pretrained(model_folder, device="cpu")
    before = torch.cuda.memory_allocated()
    pipeline.enable_model_cpu_offload("cuda")
    assert torch.cuda.memory_allocated() == before and pipeline.device.type == "cuda"
    assert pipeline(**CALL).is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_memory_on_cuda(kind):
    """Large blocks and few tokens, so that weights are what is measured: within the bound plus what is computed."""
    pipeline = SanaPipeline.from_pretrained(BUNDLED, device="cuda", dtype="fp32")
    call = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "progress_bar": False}
    pipeline(**call)
    sizes = bytes_of(pipeline)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipeline(**call)
    computed = torch.cuda.max_memory_allocated() - held
    ENABLE[kind](pipeline)
    pipeline(**call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipeline(**call)
    torch.cuda.synchronize()
    at_once = {"model": math.inf, "sequential": 1, "group": 2}[kind]
    bound = max(min(one["total"], one["rest"] + at_once * one["unit"]) for one in sizes.values())
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * bound + computed
    assert torch.cuda.memory_allocated() <= before
