"""The calls of the text encoder that are predicted are those that it makes."""

import pytest
import torch
from torch import nn

from sana.models import TEXT_ENCODERS
from sana.models.text_encoder.architectures import empty_text_encoder
from sana.models.text_encoder.chi import token_budget
from sana.models.text_encoder.load import load_text_encoder
from sana.pipelines.memory.texts import Lengths, TextRun

FOLDER = "asset/models/sana_tiny/text_encoder"
INSTRUCTION = "Draw this picture of a red cat and a blue dog. " * 4
LIMIT = 24


class Calls:
    """Notes the shapes of what a network is called with."""

    def __init__(self, network: nn.Module) -> None:
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shapes.append((tuple(kwargs["input_ids"].shape), tuple(kwargs["attention_mask"].shape)))


@pytest.mark.parametrize("instruction", ["", "Draw.", INSTRUCTION])
def test_the_same_calls_as_the_encoder(instruction) -> None:
    encoder = load_text_encoder(FOLDER, model_max_length=LIMIT, chi_prompt=instruction).requires_grad_(False)
    real = Calls(encoder.model)
    found = encoder.encode(["a cat " * LIMIT, "a dog " * LIMIT], trim=True)
    encoder.encode_null()
    tokens = len(encoder.tokenizer.encode(instruction)) if instruction else 0
    network = empty_text_encoder(FOLDER).to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.data.zero_()
    predicted = Calls(network)
    lengths = Lengths(tokens, LIMIT, LIMIT)
    with torch.no_grad():
        run = TextRun(network, TEXT_ENCODERS["gemma2"], lengths, "cpu")
        features = run.encode(2)
        run.encode_null()
    assert lengths.total == token_budget(encoder.tokenizer, instruction, LIMIT)
    assert [mask for _, mask in predicted.shapes] == [mask for _, mask in real.shapes]
    for (ids, _), (expected, _) in zip(predicted.shapes, real.shapes, strict=True):
        assert abs(ids[1] - expected[1]) <= 2  # the instruction's last tokens may merge with the prompt's first
    assert torch.stack(features).shape == found.embeds.shape == run.stack(features, 2).shape
