"""Quantising while weights are read: the bits of quantising afterwards, in less memory; quantised files; damage."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sana.models.checkpoint import CheckpointError
from sana.models.quantization.apply import Quantization, choose_layers, quantization_of, quantize
from sana.models.quantization.kernels import QuantizationUnavailableError
from sana.models.quantization.linear import QuantizedLinear
from sana.models.quantization.load import Target, Wanted, fill_transformer, from_record, to_record
from sana.models.transformer.sana import SanaMS
from sana.models.weights import load_weights
from tests.models.transformer.networks import inputs, small

CPU = torch.device("cpu")
ON_CPU = ("int8", "int8-dynamic", "nf4")
State = dict[str, torch.Tensor]


def empty() -> nn.Module:
    with torch.device("meta"):
        return SanaMS(**small().init_kwargs)


def quantised(scheme: str, dtype: torch.dtype = torch.float32, keep: tuple[str, ...] = ()) -> nn.Module:
    model = small().to(dtype).requires_grad_(False)
    quantize(model, scheme, keep=keep)
    return model


def fill(
    state: State, wanted: Wanted | None = None, record: dict | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    target = Target(dtype, CPU, CPU, wanted)
    return fill_transformer(empty(), dict(state), name="the file", record=record or {}, target=target)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    own, other = model.state_dict(), expected.state_dict()
    assert list(own) == list(other) or set(own) == set(other)
    for key, value in other.items():
        if key != "pos_embed":
            assert own[key].dtype == value.dtype and torch.equal(own[key], value), key
    with torch.no_grad():
        assert torch.equal(model(**inputs()), expected(**inputs()))
    assert not model.training and not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("scheme", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_quantised_on_the_way_have_the_bits_of_those_quantised_afterwards(scheme, dtype):
    keep = ("blocks.1.mlp.*",)
    made = fill(small().state_dict(), Wanted(scheme, keep), dtype=dtype)
    assert_same(made, quantised(scheme, dtype, keep))


@pytest.mark.parametrize("scheme", ON_CPU)
def test_a_quantised_state_is_taken_as_it_is(scheme):
    model = quantised(scheme, keep=("blocks.0.attn.qkv",))
    record = to_record(model, "transformer")
    assert record["keep"] == ["blocks.0.attn.qkv"] and record["scheme"] == scheme
    assert_same(fill(model.state_dict(), record=record), model)
    assert_same(fill(model.state_dict(), Wanted(scheme, ("blocks.0.attn.qkv",)), record), model)


def test_a_quantised_state_in_another_dtype_casts_the_exact_layers_only():
    model = quantised("int8")
    cast = fill(model.state_dict(), record=to_record(model, "transformer"), dtype=torch.bfloat16)
    values, scale = cast.blocks[0].attn.qkv.parts
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert cast.dtype == torch.bfloat16 and cast.blocks[0].attn.proj.bias.dtype == torch.bfloat16


class Reads(dict):
    """A state whose tensors are made when they are asked for; counts those that are alive at a time."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.most = 0
        self._alive: list[weakref.ref] = []

    def pop(self, key: str, *default: object) -> torch.Tensor:
        found = super().pop(key, *default)
        if found is not None:
            found = found.clone()
            self._alive = [one for one in self._alive if one() is not None]
            self._alive.append(weakref.ref(found))
            self.most = max(self.most, sum(one().nbytes for one in self._alive if one() is not None))
        return found


def test_one_exact_layer_is_in_memory_at_a_time():
    state = Reads(small().state_dict())
    largest = max(one.nbytes for one in state.values())
    target = Target(torch.float32, CPU, CPU, Wanted("int8"))
    fill_transformer(empty(), state, name="the file", record={}, target=target)
    assert not state and largest <= state.most <= 2 * largest  # a weight, and its bias or the one before it


def damaged() -> dict[str, tuple[Callable[[State, dict], None], str]]:
    key = "blocks.0.attn.qkv.int8_values"

    def without_key(state: State, record: dict) -> None:
        del state[key]

    def strange_key(state: State, record: dict) -> None:
        state["blocks.0.attn.qkv.weight"] = torch.zeros(96, 32)

    def shape(state: State, record: dict) -> None:
        state[key] = state[key][:-1]

    def dtype(state: State, record: dict) -> None:
        state[key] = state[key].float()

    def exact_dtype(state: State, record: dict) -> None:
        state["final_layer.linear.weight"] = state["final_layer.linear.weight"].to(torch.int8)

    def layers(state: State, record: dict) -> None:
        record["layers"] = record["layers"][1:]

    def unknown_layer(state: State, record: dict) -> None:
        record["layers"] = [*record["layers"], "blocks.9.attn.qkv"]

    def scheme(state: State, record: dict) -> None:
        record["scheme"] = "nf4"

    def no_layers(state: State, record: dict) -> None:
        del record["layers"]

    def unknown_scheme(state: State, record: dict) -> None:
        record["scheme"] = "int3"

    return {
        "missing tensor": (without_key, f"{key}.*in the model and not in the file"),
        "both forms": (strange_key, "in the file and not in the model"),
        "cut tensor": (shape, r"int8_values is \(95, 32\) in the file and \(96, 32\)"),
        "floats": (dtype, f"is damaged: {key} is torch.float32 where torch.int8"),
        "exact layer": (exact_dtype, "is damaged: final_layer.linear.weight is torch.int8"),
        "layer not named": (layers, "does not fit"),
        "unknown layer": (unknown_layer, "quantised in blocks.9.attn.qkv, which the transformer does not have"),
        "another scheme": (scheme, "does not fit"),
        "no layers": (no_layers, "does not say which of its layers"),
        "unknown scheme": (unknown_scheme, "quantised to 'int3'; this program knows int8"),
    }


@pytest.mark.parametrize("name", list(damaged()))
def test_damage_is_named(name):
    harm, words = damaged()[name]
    model = quantised("int8")
    state, record = dict(model.state_dict()), copy.deepcopy(to_record(model, "transformer"))
    harm(state, record)
    with pytest.raises(CheckpointError, match=words):
        fill(state, record=record)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted("nf4"), "the file holds int8 weights, and quantize.. asked for nf4. Take back the request"),
        (Wanted("int8", ("blocks.0.attn.*",)), "differ in 2 layers: blocks.0.attn.proj is quantised in the file only"),
    ],
)
def test_another_request_than_what_is_stored_is_refused(wanted, words):
    model = quantised("int8")
    with pytest.raises(CheckpointError, match=words):
        fill(model.state_dict(), wanted, to_record(model, "transformer"))


def test_exact_weights_that_do_not_fit_are_refused_before_anything_is_quantised(monkeypatch):
    state = small().state_dict()
    del state["blocks.1.attn.proj.weight"]
    monkeypatch.setattr(QuantizedLinear, "from_weight", lambda *_: pytest.fail("quantised too early"))
    with pytest.raises(CheckpointError, match=r"blocks.1.attn.proj.weight.*in the model and not in the file"):
        fill(state, Wanted("int8"))


def test_a_file_for_another_device_is_refused():
    model = quantised("int8")
    layers = choose_layers(small(), "transformer", "int8")
    with pytest.raises(QuantizationUnavailableError, match="int4 runs on CUDA"):
        fill(model.state_dict(), record={"scheme": "int4", "layers": list(layers)})
    with pytest.raises(QuantizationUnavailableError, match="int4 runs on CUDA"):
        fill(small(hidden_size=32).state_dict(), Wanted("int4", ("*.attn.*", "*.cross_attn.*")))


def test_tables_that_only_training_reads_may_be_absent():
    state = small().state_dict()
    for key in ("pos_embed", "y_embedder.y_embedding"):
        del state[key]
    made, expected = fill(state, Wanted("int8")), quantised("int8")
    assert not made.y_embedder.y_embedding.any()
    with torch.no_grad():
        assert torch.equal(made(**inputs()), expected(**inputs()))


def test_records_of_exact_networks_are_refused():
    with pytest.raises(ValueError, match="not quantised"):
        to_record(small(), "transformer")
    model = quantised("nf4")
    assert from_record(to_record(model, "transformer"), "it") == quantization_of(model)
    assert isinstance(quantization_of(model), Quantization)


def test_an_exact_model_says_why_it_does_not_take_quantised_weights():
    with pytest.raises(
        CheckpointError, match=r"holds quantised weights, which only SanaPipeline.from_pretrained loads"
    ):
        load_weights(small(), quantised("int8").state_dict())
    again = quantised("int8")
    load_weights(again, quantised("int8").state_dict())
    assert_same(again, quantised("int8"))
