"""`quantize`: which layers, what they compute in the network, and every refusal, after which nothing has changed."""

import copy

import pytest
import torch
from torch import nn

from sana.models.quantization import kernels
from sana.models.quantization.apply import (
    Quantization,
    choose_layers,
    empty_layers,
    quantization_of,
    quantize,
)
from sana.models.quantization.fp8 import quantize_fp8
from sana.models.quantization.kernels import QuantizationUnavailableError
from sana.models.quantization.linear import QuantizedLinear, QuantizedMixFFN
from sana.models.quantization.schemes import SCHEMES, quantized_bytes
from sana.models.text_encoder.load import load_text_encoder
from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from tests.models.transformer.networks import KINDS, inputs, small
from tests.parity.common import DEFAULT_FOLDER
from tests.tolerance import assert_rms_close, rms_ratio

ON_CPU = ("int8", "int8-dynamic", "nf4")
NAMES = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
FFN = ("mlp.inverted_conv", "mlp.point_conv")


def network(kind: type = SanaMS, **options: object) -> nn.Module:
    return small(kind, **options).requires_grad_(False)


def run(model: nn.Module, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(), **options)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("text")
    for source in ("tiny_gemma2", "tiny_tokenizer"):
        shutil.copytree(DEFAULT_FOLDER / "text" / source, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ON_CPU)
@pytest.mark.parametrize("kind", [SanaMS, SanaMSCM])
def test_names_counts_and_bytes(scheme, kind):
    model = network(kind, **({"cfg_embed": True} if kind is SanaMSCM else {}))
    shapes = {name: one.shape for name, one in model.named_parameters()}
    exact = sum(one.nbytes for one in model.state_dict().values())
    replaced = quantize(model, scheme)
    assert set(replaced) == {f"blocks.{i}.{name}" for i in (0, 1) for name in (*NAMES, *FFN)}
    assert quantization_of(model) == Quantization(scheme, replaced)
    saved = 0
    for name in replaced:
        shape = shapes.get(f"{name}.weight", shapes.get(f"{name}.conv.weight"))
        saved += shape.numel() * 4 - quantized_bytes(shape, scheme, torch.float32)
    assert sum(one.nbytes for one in model.state_dict().values()) == exact - saved
    assert isinstance(model.final_layer.linear, nn.Linear) and not model.blocks[0].mlp.training


@pytest.mark.parametrize("scheme", ON_CPU)
def test_every_row_of_a_batch_is_its_own_run(scheme):
    model, given = network(), inputs(3)
    quantize(model, scheme)
    with torch.no_grad():
        whole = model(**given)
        for row in range(3):
            assert torch.equal(model(**{name: one[row : row + 1] for name, one in given.items()}), whole[row : row + 1])


@pytest.mark.parametrize("scheme", ON_CPU)
def test_prepared_texts_and_times_are_the_plain_forward(scheme):
    model, given = network(), inputs()
    quantize(model, scheme)
    text = model.cache_text(given["y"], given["mask"])
    time = model.cache_time(given["timestep"][:1])[0]
    given["timestep"] = given["timestep"][:1].expand(2)
    with torch.no_grad():
        assert_rms_close(model.denoise(given["x"], time, text), model(**given))


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.05), ("int8-dynamic", 0.1), ("nf4", 0.8)])
def test_the_whole_network_is_near_but_not_equal(scheme, limit):
    model = network()
    exact = run(model)
    quantize(model, scheme)
    assert limit / 50 < rms_ratio(run(model), exact) < limit
    assert torch.isfinite(run(model, pag_layers=(0,), pag_rows=1)).all()


def test_int8_rounds_weights_and_nothing_else():
    model, rounded = network(), network()
    for name in quantize(model, "int8"):
        layer, exact = model.get_submodule(name), rounded.get_submodule(name)
        values, scale = layer.parts
        exact = getattr(exact, "conv", exact)
        exact.weight.data = (values * scale).view_as(exact.weight)
    assert_rms_close(run(model), run(rounded))


@pytest.mark.parametrize("options", [{"ffn_type": "mlp"}, {"ffn_type": "dwmlp"}, {"attn_type": "flash"}])
def test_other_kinds_of_blocks(options):
    model = network(**options)
    exact, replaced = run(model), quantize(model, "int8")
    assert rms_ratio(run(model), exact) < 0.05
    plain = "ffn_type" in options
    assert ("blocks.0.mlp.fc1" in replaced) == plain and ("blocks.1.mlp.point_conv" in replaced) != plain


def test_a_controlnet_is_quantised_in_both_branches():
    model = network(KINDS["SanaMSControlNet"])
    given = {**inputs(), "data_info": {"control_signal": torch.randn(2, 4, 4, 6)}}
    with torch.no_grad():
        exact, replaced = model(**given), quantize(model, "int8")
        assert rms_ratio(model(**given), exact) < 0.05
    assert "controlnet.0.copied_block.attn.qkv" in replaced
    assert isinstance(model.controlnet[0].after_proj, nn.Linear)


def test_layers_that_are_kept_stay_exact():
    model = network()
    replaced = quantize(model, "int8", keep=("blocks.0.*", "*.mlp.point_conv"))
    assert set(replaced) == {f"blocks.1.{name}" for name in (*NAMES, FFN[0])}
    assert not isinstance(model.blocks[0].mlp, QuantizedMixFFN)
    mixed = model.blocks[1].mlp
    assert isinstance(mixed, QuantizedMixFFN) and not isinstance(mixed.point_conv, QuantizedLinear)
    assert torch.isfinite(run(model)).all()


def test_a_text_encoder(text_folder):
    encoder = load_text_encoder(text_folder, model_max_length=20).requires_grad_(False)
    exact = encoder.encode(["a cat"], trim=True)
    fingerprint = encoder.fingerprint()
    replaced = quantize(encoder, "int8")
    assert len(replaced) == 7 * encoder.model.config.num_hidden_layers and "layers.0.mlp.up_proj" in replaced
    coarse = encoder.encode(["a cat"], trim=True)
    assert 1e-5 < rms_ratio(coarse.embeds, exact.embeds) < 0.05
    assert torch.equal(coarse.mask, exact.mask) and encoder.fingerprint() != fingerprint
    assert quantization_of(encoder) == Quantization("int8", replaced)


def refusals():
    meta = SanaMS
    yield "unknown scheme", network(), {"scheme": "int3"}, "Unknown quantisation 'int3'"
    yield "no match", network(), {"keep": ("blocks.7.*",)}, "keep: no layer.*'blocks.7.\\*'.*such as blocks.0.attn.qkv"
    yield "exact anyway", network(), {"keep": ("final_layer.linear",)}, "keep: no layer"
    yield "a text", network(), {"keep": "blocks.0.*"}, "must be a list of patterns"
    yield "all kept", network(), {"keep": ("*",)}, "Nothing of the transformer is left"
    yield "learning", small(), {}, r"set to learn.*requires_grad_\(False\)"
    yield "training", network().train(), {}, "set to learn"
    yield "unknown layer", network(ffn_type="mbconvpreglu"), {}, "mlp.inverted_conv.conv in a PreGluMBConv"
    yield "width", network(mlp_ratio=1.3125, hidden_size=32), {"scheme": "int8-dynamic"}, "multiple of 8"
    yield "no blocks", nn.Linear(4, 4), {}, "A Linear is not quantised"
    with torch.device("meta"):
        empty = meta(**small().init_kwargs)
    yield "no weights", empty, {}, "has no weights yet"


@pytest.mark.parametrize(("model", "options", "words"), [pytest.param(*rest, id=name) for name, *rest in refusals()])
def test_refusals_change_nothing(model, options, words):
    before = {name: type(one) for name, one in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        quantize(model, **{"scheme": "int8", **options})
    assert {name: type(one) for name, one in model.named_modules()} == before


def test_twice_is_refused_whoever_was_first():
    for first in (lambda model: quantize(model, "int8"), lambda model: quantize_fp8(model, backend="reference")):
        model = network()
        first(model)
        with pytest.raises(ValueError, match="already"):
            quantize(model, "nf4")
    model = network()
    quantize(model, "nf4")
    with pytest.raises(ValueError, match="quantised to nf4 already"):
        quantize_fp8(model, backend="reference")


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_devices_without_the_arithmetic_are_refused_by_name(scheme):
    model = network()
    with pytest.raises(QuantizationUnavailableError, match=f"{scheme} runs on CUDA.*this model is on cpu: use int8"):
        quantize(model, scheme)
    assert quantization_of(model) is None


def test_a_network_for_another_device_is_checked_for_that_one(monkeypatch):
    asked = []
    monkeypatch.setattr("sana.models.quantization.apply.require", lambda name, device: asked.append(device.type))
    quantize(network(), "int8", device=torch.device("cuda"))
    quantize(network(), "int8")
    assert asked == ["cuda", "cpu"]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_empty_layers_are_what_the_planner_counts(scheme):
    with torch.device("meta"):
        model = SanaMS(**{**small().init_kwargs, "hidden_size": 64, "num_heads": 4})
    shapes = {name: one.shape for name, one in model.named_parameters()}
    chosen = choose_layers(model, "transformer", scheme)
    empty_layers(model, Quantization(scheme, chosen))
    for name in chosen:
        shape = shapes.get(f"{name}.weight", shapes.get(f"{name}.conv.weight"))
        assert model.get_submodule(name).weight_bytes == quantized_bytes(shape, scheme, torch.float32)


def test_fp8_computes_as_quantize_fp8_does(monkeypatch):
    """On a CPU with the GPU's product stood in for: the same numbers, and the text's keys and values besides."""
    from sana.ops.fp8.function import fp8_linear

    monkeypatch.setattr(kernels, "fp8_linear", lambda *args, backend: fp8_linear(*args, backend="reference"))
    monkeypatch.setattr("sana.models.quantization.apply.require", lambda *_: None)
    model, other = network(), network()
    replaced = quantize(model, "fp8", keep=("*.cross_attn.kv_linear",))
    assert set(replaced) == set(quantize_fp8(other, backend="reference"))
    assert torch.equal(run(model), run(other))
    assert quantization_of(other).scheme == "fp8"


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "nf4"])
def test_a_block_compiles_whole(scheme):
    model = network()
    quantize(model, scheme)
    eager = run(model)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert_rms_close(run(model), eager)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_gpu_network(scheme):
    device = torch.device("cuda")
    try:
        kernels.require(scheme, device)
    except QuantizationUnavailableError as error:
        pytest.skip(str(error))
    model = network(hidden_size=128, num_heads=4).to(device, torch.bfloat16)
    given = {name: one.to(device) for name, one in inputs().items()}
    with torch.no_grad():
        exact = model(**given)
        quantize(model, scheme)
        coarse = model(**given)
        away = copy.deepcopy(model).to("cpu").to(device)  # as offload does
        assert torch.equal(away(**given), coarse)
    limit = {"int8": 0.1, "int8-dynamic": 0.2, "fp8": 0.4}.get(scheme, 0.9)
    assert 1e-4 < rms_ratio(coarse.float(), exact.float()) < limit
