"""The table of shapes against the published numbers of parameters."""

import pytest
import torch

from sana.models.text_encoder.architectures import (
    ARCHITECTURES,
    architecture,
    empty_text_encoder,
    encoder_class,
    instruction_tokens,
)
from sana.models.text_encoder.base import TextEncoderError
from sana.models.text_encoder.chi import CHI_PROMPT
from sana.models.text_encoder.load import OFFICIAL_ENCODERS

# From the model cards (parameters of the safetensors files). T5: of encoder and decoder together.
PARAMETERS = {
    "gemma-2b": 2_506_172_416,
    "gemma-2b-it": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-9b-it": 9_241_705_984,
    "Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen2-1.5B-Instruct": 1_543_714_304,
}
T5_PARAMETERS = {
    "T5-small": 76_961_152,
    "T5-base": 247_577_856,
    "T5-large": 783_150_080,
    "T5-xl": 2_849_757_184,
    "T5-xxl": 11_135_332_352,
    "T5": 11_135_332_352,
}


def test_every_official_encoder_is_in_the_table() -> None:
    assert set(ARCHITECTURES) == set(OFFICIAL_ENCODERS) == set(PARAMETERS) | set(T5_PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_decoders_have_their_published_size(name) -> None:
    assert sum(parameter.numel() for parameter in empty_text_encoder(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", T5_PARAMETERS)
def test_t5_has_its_published_size_with_its_decoder(name) -> None:
    from transformers import AutoConfig, T5ForConditionalGeneration

    fields = architecture(name)
    config = AutoConfig.for_model(fields.pop("model_type"), num_decoder_layers=fields["num_layers"], **fields)
    with torch.device("meta"):
        whole = T5ForConditionalGeneration(config)
    head = 0 if whole.lm_head.weight is not whole.shared.weight else whole.lm_head.weight.numel()  # its own in v1.1
    assert sum(parameter.numel() for parameter in whole.parameters()) + head == T5_PARAMETERS[name]
    own = dict(empty_text_encoder(name).named_parameters())
    parts = {key: one.shape for key, one in whole.named_parameters() if key.startswith(("shared", "encoder"))}
    assert {key: one.shape for key, one in own.items()} == parts


def test_a_hub_id_is_its_official_name() -> None:
    assert architecture("Efficient-Large-Model/gemma-2-2b-it") == architecture("gemma-2-2b-it")
    assert architecture("hf://google/gemma-2-9b") == architecture("gemma-2-9b")


def test_a_local_folder_says_itself_what_it_is() -> None:
    folder = "asset/models/sana_tiny/text_encoder"
    assert architecture(folder)["hidden_size"] == 160
    network = empty_text_encoder(folder)
    assert next(network.parameters()).is_meta
    assert network.config._attn_implementation == encoder_class(folder).attention == "eager"


def test_the_instruction_is_counted_or_estimated() -> None:
    folder = "asset/models/sana_tiny/text_encoder"
    assert instruction_tokens(folder, "") == 0
    assert 3 < instruction_tokens(folder, "Draw this picture.") < 18
    assert instruction_tokens("T5-small", CHI_PROMPT) == 0
    assert 250 < instruction_tokens("gemma-2-2b-it", CHI_PROMPT) < 350


def test_an_unknown_encoder_is_refused_with_what_to_do() -> None:
    with pytest.raises(TextEncoderError, match="is not known: give text_encoder.text_encoder_name a local folder"):
        empty_text_encoder("someone/strange-lm")
