"""A pipeline quantised before or after loading: the same pictures and hash; compiled, offloaded, moved; refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sana.models.checkpoint import CheckpointError
from sana.models.quantization.apply import quantization_of
from sana.models.quantization.kernels import QuantizationUnavailableError
from sana.models.quantization.linear import QuantizedLinear
from sana.models.text_encoder.precomputed import save_prompt_embeds
from sana.ops import packing
from sana.pipelines import loading
from sana.pipelines.offload import _Offload
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.models.layers.stand_in import StandIn

CALL = {"prompt": ["a cat", "two dogs by the sea"], "seed": 3, "num_inference_steps": 3, "progress_bar": False}
SCHEMES = [("int8", None), ("int8-dynamic", "int8"), ("nf4", "nf4"), (None, "int8-dynamic")]


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packed copies of weights: whether there is one decides the last bits."""
    monkeypatch.setattr(packing, "pack_budget", lambda: 0)


@pytest.fixture
def open_pipeline(model_folder: Path) -> Callable[[], SanaPipeline]:
    return lambda: SanaPipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def closed_pipeline(model_folder: Path) -> Callable[[], SanaPipeline]:
    """A pipeline without weights."""
    return lambda: SanaPipeline(loading.source_config(loading.find_model(model_folder)), device="cpu")


def draw(pipeline: SanaPipeline, **options: object) -> torch.Tensor:
    return pipeline(**{**CALL, "output_type": "pt", **options})


@pytest.mark.parametrize(("transformer", "text"), SCHEMES)
def test_before_and_after_loading_make_the_same_picture(
    open_pipeline, closed_pipeline, model_folder, transformer, text
):
    after = open_pipeline()
    exact, hashed = draw(after), after.weights_hash()
    after.quantize(transformer, text)
    before = closed_pipeline().quantize(transformer, text).from_pretrained(model_folder)
    picture = draw(after)
    assert torch.equal(draw(before), picture) and not torch.equal(picture, exact)
    assert before.weights_hash() == after.weights_hash() != hashed
    for pipeline in (before, after):
        for network, scheme in ((pipeline.transformer, transformer), (pipeline.text_encoder, text)):
            found = quantization_of(network)
            assert (found.scheme if found else None) == scheme


def test_each_scheme_has_a_hash_of_its_own(open_pipeline):
    hashes = {open_pipeline().weights_hash()}
    for scheme in ("int8", "int8-dynamic", "nf4"):
        hashes.add(open_pipeline().quantize(scheme).weights_hash())
        hashes.add(open_pipeline().quantize(scheme, keep=("blocks.0.*",)).weights_hash())
    assert len(hashes) == 7


def test_a_picture_does_not_depend_on_its_batch(open_pipeline):
    for scheme in ("int8", "int8-dynamic", "nf4"):
        pipeline = open_pipeline().quantize(scheme, scheme)
        both = draw(pipeline)
        assert torch.equal(draw(pipeline, prompt=CALL["prompt"][1], seed=CALL["seed"] + 1), both[1:])


def test_other_weights_are_quantised_when_they_are_loaded(open_pipeline, model_folder):
    pipeline = open_pipeline().quantize("int8")
    first = pipeline.transformer
    pipeline.from_pretrained(model_folder)
    assert pipeline.transformer is not first and quantization_of(pipeline.transformer).scheme == "int8"


def test_the_text_encoder_is_quantised_when_it_is_first_used(open_pipeline, monkeypatch):
    pipeline = open_pipeline()
    monkeypatch.setattr(QuantizedLinear, "from_weight", lambda *_: pytest.fail("too early"))
    pipeline.quantize(None, "int8")
    assert pipeline._text_encoder is None
    monkeypatch.undo()
    assert quantization_of(pipeline.text_encoder).scheme == "int8"


def test_texts_known_before_are_encoded_anew(open_pipeline):
    pipeline = open_pipeline()
    exact = pipeline.encode_prompts(["a cat"]).embeds
    pipeline.quantize(None, "int8")
    assert not torch.equal(pipeline.encode_prompts(["a cat"]).embeds, exact)


def test_patterns_reach_the_network_that_they_name(open_pipeline):
    pipeline = open_pipeline().quantize("int8", "int8", keep=("blocks.0.*", "text_encoder.layers.0.mlp.*"))
    assert all(name.startswith("blocks.1.") for name in quantization_of(pipeline.transformer).layers)
    layers = quantization_of(pipeline.text_encoder).layers
    assert "layers.0.self_attn.q_proj" in layers and not any(name.startswith("layers.0.mlp.") for name in layers)


def test_another_dtype_keeps_the_stored_weights(open_pipeline):
    pipeline = open_pipeline().quantize("int8")
    before = [part.clone() for part in pipeline.transformer.blocks[0].attn.qkv.parts]
    pipeline.to(torch.bfloat16)
    assert all(map(torch.equal, before, pipeline.transformer.blocks[0].attn.qkv.parts))
    assert torch.isfinite(draw(pipeline)).all()


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "nf4"])
@pytest.mark.parametrize("first", ["offload", "quantize"])
def test_offload_makes_the_same_picture(open_pipeline, scheme, first):
    expected = draw(open_pipeline().quantize(scheme, scheme))
    pipeline, mover = open_pipeline(), StandIn()
    steps = [lambda: pipeline._change(_Offload("sequential", mover, 1)), lambda: pipeline.quantize(scheme, scheme)]
    for step in steps if first == "offload" else reversed(steps):
        step()
    assert torch.equal(draw(pipeline), expected)
    assert quantization_of(pipeline.transformer).scheme == scheme


def test_compiled_blocks_are_those_of_the_quantised_layers(open_pipeline):
    expected = draw(open_pipeline().quantize("int8"))
    torch._dynamo.reset()
    pipeline = open_pipeline().compile("regional", backend="eager")
    exact = draw(pipeline)
    pipeline.quantize("int8")
    picture = draw(pipeline)
    assert not torch.equal(picture, exact)
    assert (picture - expected).abs().max() < 1e-4
    pipeline.compile("off")


def refusals():
    yield {"transformer": "int3"}, "Unknown quantisation 'int3'"
    yield {"transformer": None}, "needs a scheme"
    yield {"transformer": "int4"}, "int4 runs on CUDA.*this model is on cpu: use int8"
    yield {"text_encoder": "fp8"}, "fp8 runs on CUDA"
    yield {"keep": "blocks.0.*"}, "must be a list of patterns"
    yield {"keep": ("nothing.*",)}, "keep: no layer of the transformer"
    yield {"keep": ("text_encoder.layers.0.*",)}, "has no effect, for the text encoder is not quantised"
    yield {"text_encoder": "int8", "keep": ("text_encoder.layers.9.*",)}, "keep: no layer of the text encoder"


@pytest.mark.parametrize(("options", "words"), list(refusals()))
def test_refusals_change_nothing(open_pipeline, options, words):
    pipeline = open_pipeline()
    hashed = pipeline.weights_hash()  # loads all
    with pytest.raises(ValueError, match=words):
        pipeline.quantize(**options)
    assert quantization_of(pipeline.transformer) is None and quantization_of(pipeline.text_encoder) is None
    pipeline._weights_hash = None
    assert pipeline.weights_hash() == hashed and not pipeline._quantization


def test_twice_is_refused_before_and_after_loading(open_pipeline, closed_pipeline, model_folder):
    for pipeline in (open_pipeline(), closed_pipeline()):
        pipeline.quantize("int8")
        with pytest.raises(ValueError, match="transformer is or becomes int8"):
            pipeline.quantize("nf4")
        pipeline.quantize(None, "int8")  # the other network is free
    with pytest.raises(QuantizationUnavailableError):
        closed_pipeline().quantize("int4")


def test_layers_that_do_not_exist_are_named_when_weights_come(closed_pipeline, model_folder):
    pipeline = closed_pipeline().quantize("int8", keep=("blocks.77.*",))
    with pytest.raises(ValueError, match="keep: no layer"):
        pipeline.from_pretrained(model_folder)
    assert pipeline.transformer is None


def test_a_file_of_embeddings_has_no_network(open_pipeline, tmp_path):
    pipeline = open_pipeline()
    save_prompt_embeds(tmp_path / "prompts.safetensors", ["a cat"], pipeline.text_encoder)
    stored = open_pipeline()
    stored.config.text_encoder.text_encoder_name = str(tmp_path / "prompts.safetensors")
    with pytest.raises(ValueError, match="is a file of embeddings"):
        stored.quantize(None, "int8")


def test_damaged_weights_are_named(closed_pipeline, model_folder, tmp_path):
    cut = tmp_path / "model.safetensors"
    cut.write_bytes((model_folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        closed_pipeline().quantize("int8").from_pretrained(cut)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "nf4"])
def test_gpu_pictures_are_near_those_of_exact_weights(model_folder, scheme):
    exact = SanaPipeline.from_pretrained(model_folder, device="cuda", dtype="bf16")
    coarse = SanaPipeline.from_pretrained(model_folder, device="cuda", dtype="bf16").quantize(scheme, scheme)
    limit = 0.8 if scheme == "nf4" else 0.2
    first, second = (draw(one, output_type="latent").float() for one in (exact, coarse))
    assert (second - first).norm() / first.norm() < limit
    coarse.enable_sequential_cpu_offload()
    assert torch.equal(draw(coarse, output_type="latent").float(), second)
