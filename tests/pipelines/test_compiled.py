"""SanaPipeline.compile: what each mode does, which calls share a graph, what runs step by step, and undoing it."""

import copy
import logging

import pytest
import torch

from sana.pipelines import compiled as compiled_module
from sana.pipelines.compiled import CompiledPipeline, CompileSettings
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.graphs import CaptureError
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.pipelines.recorder import StandInRecorder
from tests.tolerance import assert_rms_close

SHORT = {"num_inference_steps": 3, "progress_bar": False, "output_type": "latent", "seed": 3}


@pytest.fixture(scope="module")
def loaded(model_folder):
    made = SanaPipeline.from_pretrained(model_folder, device="cpu")
    made("a cat", **SHORT)  # loads the other networks
    return made


@pytest.fixture
def pipeline(loaded):
    """A pipeline of its own for each test."""
    made = copy.deepcopy(loaded)
    yield made
    made.compile("off")


@pytest.fixture
def recorder():
    return StandInRecorder()


@pytest.fixture
def captured(pipeline, recorder):
    """The pipeline in mode "graph", on a stand-in for CUDA graphs."""
    pipeline._compiled = CompiledPipeline(pipeline, CompileSettings("graph"), recorder)
    return pipeline


def eager(pipeline, *args, **options):
    """Calls the pipeline as it is without compile."""
    before, pipeline._compiled = pipeline._compiled, None
    try:
        return pipeline(*args, **options)
    finally:
        pipeline._compiled = before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "known modes: off, regional, graph, max"),
        ({"mode": "graph"}, "this pipeline is on the device 'cpu'"),
        ({"mode": "max"}, r"use compile\('regional'\)"),
        ({"mode": "regional", "max_graphs": 0}, "at least 1"),
        ({"mode": "regional", "max_graph_bytes": 0}, "at least 1"),
        ({"mode": "regional", "torch_options": {"mode": "reduce-overhead"}}, "captures graphs of its own"),
    ],
)
def test_wrong_settings_change_nothing(captured, options, message):
    before = captured._compiled
    with pytest.raises(ValueError, match=message):
        captured.compile(**options)
    assert captured._compiled is before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "flow_euler"},
        {"pag_scale": 2.0},
        {"guidance_scale": 1.0},
        {"interval_guidance": (0.3, 0.9)},
        {"step_cache": 0.5},
        {"negative_prompt": "grey"},
    ],
)
def test_a_captured_loop_gives_what_the_steps_give(captured, recorder, options):
    wanted = eager(captured, ["a cat", "雪山日出"], **SHORT, **options)
    assert torch.equal(captured(["a cat", "雪山日出"], **SHORT, **options), wanted)
    assert torch.equal(captured(["a cat", "雪山日出"], **SHORT, **options), wanted)
    assert [one.replays for one in recorder.recordings] == [2]


def test_sizes_and_batches_in_a_row(captured, recorder):
    calls = [(["a cat"], 64, 64, 1), (["a", "b"], 64, 64, 1), (["a cat"], 96, 64, 1), (["a"], 64, 64, 2)]
    for prompts, height, width, number in (*calls, *reversed(calls)):
        options = {"height": height, "width": width, "num_images_per_prompt": number, **SHORT}
        assert torch.equal(captured(prompts, **options), eager(captured, prompts, **options))
    assert len(recorder.recordings) == 3, "two images of one prompt are a batch like two prompts"


def test_what_a_graph_bakes_in_tells_loops_apart(captured, recorder):
    base = {**SHORT, "height": 64, "width": 64, "pag_scale": 2.0}
    changes = [
        {"num_inference_steps": 4},
        {"flow_shift": 2.0},
        {"sampler": "flow_euler"},
        {"guidance_scale": 3.0},
        {"pag_scale": 3.0},
        {"pag_scale": 1.0},
        {"interval_guidance": (0.0, 0.5), "pag_scale": 1.0},
        {"step_cache": 0.5, "pag_scale": 1.0},
        {"height": 96},
        {"num_images_per_prompt": 2},
    ]
    captured._compiled = CompiledPipeline(captured, CompileSettings("graph", max_graphs=20), recorder)
    captured("a cat", **base)
    for number, change in enumerate(changes, start=2):
        captured("a cat", **{**base, **change})
        assert len(recorder.recordings) == number, f"{change} shares a graph"
    for change in ({"seed": 9}, *changes):
        captured("a cat", **{**base, **change})
    assert len(recorder.recordings) == len(changes) + 1


def test_other_blocks_of_pag_and_dtypes_are_other_loops(captured, recorder):
    captured("a cat", pag_scale=2.0, **SHORT)
    captured.config.model.pag_applied_layers = [0, 1]
    captured("a cat", pag_scale=2.0, **SHORT)
    assert len(recorder.recordings) == 2
    captured.to(torch.bfloat16)
    captured("a cat", pag_scale=2.0, **SHORT)
    assert len(recorder.recordings) == 3


def test_text_length_is_part_of_the_key_and_the_text_is_not(captured, recorder):
    def call(length, seed):
        generator = torch.Generator().manual_seed(seed)
        width = captured.transformer.architecture.caption_channels
        embeds = torch.randn(1, length, width, generator=generator)
        options = {
            "prompt_embeds": embeds,
            "prompt_attention_mask": torch.ones(1, length),
            "negative_prompt_embeds": embeds.flip(1),
            **SHORT,
        }
        assert torch.equal(captured(None, **options), eager(captured, None, **options))

    for length, seed in ((8, 0), (8, 1), (6, 0), (8, 2)):
        call(length, seed)
    assert len(recorder.recordings) == 2


def test_no_more_graphs_than_asked_for(pipeline, recorder):
    pipeline._compiled = CompiledPipeline(pipeline, CompileSettings("graph", max_graphs=2), recorder)
    for steps in (2, 3, 4, 5):
        pipeline("a cat", **{**SHORT, "num_inference_steps": steps})
    assert recorder.live == 2


def test_a_callback_makes_it_run_step_by_step_which_is_said_once(captured, recorder, caplog):
    caplog.set_level(logging.INFO, "sana")
    wanted, seen = eager(captured, "a cat", **SHORT), []
    for _ in range(2):
        assert torch.equal(
            captured("a cat", callback_on_step_end=lambda *given: seen.append(given[1]), **SHORT), wanted
        )
    assert seen == [0, 1, 2, 0, 1, 2] and not recorder.recordings
    assert sum("callback_on_step_end runs on the host" in line for line in caplog.messages) == 1


def test_samplers_that_draw_noise_are_not_captured(captured):
    request = compiled_module.Request(prompt="a cat")
    for sampler in ("sa-solver", "scm", "trigflow"):
        reason = captured._compiled._why_not_captured(sampler, request)
        assert reason is not None and sampler in reason
    for sampler in compiled_module.CAPTURED_SAMPLERS:
        assert captured._compiled._why_not_captured(sampler, request) is None


def test_a_pipeline_that_left_the_gpu_runs_step_by_step(captured, caplog):
    caplog.set_level(logging.INFO, "sana")
    wanted = eager(captured, "a cat", **SHORT)
    captured._compiled._recorder = None  # as in a pipeline that was compiled on a GPU
    assert torch.equal(captured("a cat", **SHORT), wanted)
    assert "moved to the device 'cpu'" in caplog.text


def test_a_capture_that_fails_is_an_error_and_the_next_call_works(captured, recorder):
    recorder.fail = "This cannot run as a graph, because it waits for the host at sana.py:1."
    with pytest.raises(CaptureError, match="waits for the host"):
        captured("a cat", **SHORT)
    recorder.fail = None
    assert torch.equal(captured("a cat", **SHORT), eager(captured, "a cat", **SHORT))


def test_values_that_are_not_finite_name_the_layer(captured):
    captured("a cat", **SHORT)
    with torch.no_grad():
        captured.transformer.blocks[1].attn.proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.attn\.proj\.weight"):
        captured("a cat", **SHORT)


def test_moved_weights_drop_the_graphs(captured, recorder, model_folder):
    captured("a cat", **SHORT)
    captured.to(dtype=torch.float64)
    assert recorder.live == 0, "to() gives the memory back at once"
    captured.to(dtype=torch.float32)
    captured("a cat", **SHORT)
    captured.from_pretrained(model_folder)
    captured.transformer.blocks[0].scale_shift_table.data.add_(0.1)
    assert torch.equal(captured("a cat", **SHORT), eager(captured, "a cat", **SHORT))
    assert (len(recorder.recordings), recorder.live) == (3, 1)
    captured.transformer.blocks[0].mlp = captured.transformer.blocks[1].mlp
    assert torch.equal(captured("a cat", **SHORT), eager(captured, "a cat", **SHORT))
    assert (len(recorder.recordings), recorder.live) == (4, 1)


def test_off_gives_the_graphs_back(captured, recorder):
    captured("a cat", **SHORT)
    assert captured.compile("off") is captured
    assert recorder.live == 0 and recorder.retired == 1 and captured._compiled is None


def unique_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_regional_gives_the_same_pictures_and_off_undoes_it(pipeline, fresh_dynamo, caplog):
    caplog.set_level(logging.INFO, "sana")
    wanted = pipeline(["a cat"], **SHORT)
    assert pipeline.compile("regional", backend="aot_eager") is pipeline
    before = unique_graphs()
    assert_rms_close(pipeline(["a cat"], **SHORT), wanted)
    assert unique_graphs() == before + 1, "one code for all blocks, steps and branches"
    assert "of the transformer; this first call took" in caplog.text
    blocks = list(pipeline.transformer.blocks)
    pipeline.compile("off")
    assert all(block._compiled_call_impl is None for block in blocks)
    before = unique_graphs()
    assert torch.equal(pipeline(["a cat"], **SHORT), wanted)
    assert unique_graphs() == before


@pytest.mark.slow
def test_regional_for_sizes_and_batches_in_a_row(pipeline, fresh_dynamo):
    calls = [
        (["a cat"], {"height": 64, "width": 64}),
        (["a", "b"], {"height": 96, "width": 64, "output_type": "pt"}),
        (["a cat"], {"height": 64, "width": 96, "pag_scale": 2.0}),
        (["a much longer prompt with many more words"], {"height": 128, "width": 64}),
    ]
    wanted = [pipeline(prompts, **{**SHORT, **options}) for prompts, options in calls]
    pipeline.compile("regional", backend="aot_eager")
    for (prompts, options), picture in zip((*calls, *calls), (*wanted, *wanted), strict=True):
        assert_rms_close(pipeline(prompts, **{**SHORT, **options}), picture, what=str(options))


def test_regional_follows_new_weights(pipeline, model_folder, fresh_dynamo):
    pipeline.compile("regional", backend="aot_eager")
    pipeline("a cat", **SHORT)
    old = pipeline.transformer
    pipeline.from_pretrained(model_folder)
    wanted = eager(pipeline, "a cat", **SHORT)
    assert_rms_close(pipeline("a cat", **SHORT), wanted)
    assert pipeline.transformer.blocks[0]._compiled_call_impl is not None
    assert old.blocks[0]._compiled_call_impl is None


@pytest.mark.slow
def test_regional_with_inductor(pipeline, fresh_dynamo, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))  # what torch finds in its cache is not stored
    wanted = pipeline("a cat", **SHORT)
    pipeline.compile("regional", cache_dir=tmp_path / "cache")
    assert_rms_close(pipeline("a cat", **SHORT), wanted)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_max_captures_compiles_and_uses_triton_and_off_undoes_all_of_it(pipeline, recorder, monkeypatch):
    class Fast(type(pipeline.autoencoder)):
        def prepare_for_decoding(self, dtype, *, channels_last, compile):
            self.prepared = (dtype, channels_last, compile)
            return self

    original = pipeline.autoencoder
    original.__class__ = Fast
    backends = [getattr(module, "backend", None) for module in pipeline.transformer.modules()]
    pipeline._compiled = made = CompiledPipeline(pipeline, CompileSettings("max", backend="aot_eager"), recorder)
    with made.watch("the transformer"):
        set_to = {module.backend for module in pipeline.transformer.modules() if hasattr(module, "backend")}
        assert set_to == {"triton"}
        assert all(block._compiled_call_impl is not None for block in pipeline.transformer.blocks)
    fast = made.autoencoder()
    assert fast is not original and fast.prepared == (torch.bfloat16, True, True)
    assert made.autoencoder() is fast, "one copy serves all calls"
    assert not hasattr(original, "prepared") and pipeline.autoencoder is original
    original.to(torch.float64)
    assert made.autoencoder() is not fast, "the copy follows its original"
    pipeline.compile("off")
    assert [getattr(module, "backend", None) for module in pipeline.transformer.modules()] == backends
    assert all(block._compiled_call_impl is None for block in pipeline.transformer.blocks)


def test_decoding_needs_no_transformer(pipeline):
    latents = pipeline("a cat", **SHORT)
    wanted = pipeline.decode(latents)
    pipeline.transformer = None
    pipeline.compile("regional", backend="aot_eager")
    assert torch.equal(pipeline.decode(latents), wanted)


# On a GPU.


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def on_gpu(model_folder, request):
    made = SanaPipeline.from_pretrained(model_folder, device="cuda", dtype=request.param)
    yield made
    made.compile("off")


GPU_CALLS = [
    (["a cat"], {"height": 64, "width": 64}),
    (["a", "b", "a much longer prompt with many more words"], {"height": 96, "width": 64}),
    (["a cat"], {"height": 64, "width": 64, "pag_scale": 2.0}),
    (["a cat"], {"height": 64, "width": 128, "sampler": "flow_euler", "interval_guidance": (0.2, 0.9)}),
    (["a", "b"], {"height": 64, "width": 64, "guidance_scale": 1.0}),
]


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_what_the_steps_give(on_gpu):
    on_gpu.compile("graph")
    for prompts, options in (*GPU_CALLS, *reversed(GPU_CALLS)):
        given = {**SHORT, **options}
        assert_rms_close(on_gpu(prompts, **given), eager(on_gpu, prompts, **given), on_gpu.dtype, what=str(options))


@pytest.mark.gpu
def test_a_captured_call_waits_only_to_check_its_result(on_gpu):
    on_gpu.compile("graph")
    on_gpu("a cat", **SHORT)
    graphs = on_gpu._compiled._graphs
    key, recording = next(iter(graphs._recordings.items()))
    inputs = {name: buffer.clone() for name, buffer in recording.inputs.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphs.call(key[0], lambda **_: None, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_graphs_of_many_sizes_stay_bounded_and_off_gives_memory_back(on_gpu):
    on_gpu("a cat", **SHORT)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    on_gpu.compile("graph", max_graphs=2)
    held = []
    for height in (64, 96, 128, 160, 192):
        on_gpu("a cat", **{**SHORT, "height": height, "width": 64})
        held.append(on_gpu._compiled._graphs.bytes)
        assert len(on_gpu._compiled._graphs) <= 2
    assert max(held) <= 2**28, "tiny loops hold tiny pools"
    on_gpu.compile("off")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26


@pytest.mark.gpu
@pytest.mark.slow
def test_max_on_a_gpu(on_gpu):
    wanted = [eager(on_gpu, prompts, **{**SHORT, **options}) for prompts, options in GPU_CALLS]
    on_gpu.compile("max")
    for (prompts, options), latents in zip(GPU_CALLS, wanted, strict=True):
        assert_rms_close(on_gpu(prompts, **{**SHORT, **options}), latents, on_gpu.dtype, what=str(options))
    picture = on_gpu("a cat", **{**SHORT, "output_type": "pt"})
    assert torch.isfinite(picture).all()
    assert on_gpu.autoencoder.dtype == torch.float32
