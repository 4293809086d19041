"""Runs the recorded text encodings: kind text_encode."""

import torch

from sana.models.text_encoder import load_text_encoder, tokenize_prompts
from tests.parity.common import Case

DEFAULT_ENCODER = "text/tiny_gemma2"


def run_text_encode(case: Case) -> None:
    """Prompts with or without the instruction, or the null caption; padding rows are compared too."""
    call = case.call
    named = case.constructor.get("text_encoder", DEFAULT_ENCODER).split()[0]  # a remark follows the folder
    encoder = load_text_encoder(
        case.path(named),
        tokenizer_path=case.path(case.constructor["tokenizer"]),
        dtype=torch.float32,
        model_max_length=call["model_max_length"],
        chi_prompt=call.get("chi_prompt", []),
    )
    expected = case.tensors("out.")
    if "null_caption_embs" in expected:
        null = encoder.encode_null()
        tokens = tokenize_prompts(encoder.tokenizer, [""], model_max_length=call["model_max_length"])
        case.assert_close(null.embeds, expected["null_caption_embs"], "null_caption_embs")
        if "attention_mask" in expected:
            case.assert_close(null.mask, expected["attention_mask"], "attention_mask")
        if "input_ids" in expected:
            case.assert_close(tokens.input_ids, expected["input_ids"], "input_ids")
        return
    tokens = tokenize_prompts(
        encoder.tokenizer,
        call["prompts"],
        chi_prompt=call.get("chi_prompt", []),
        model_max_length=call["model_max_length"],
    )
    assert tokens.input_ids.shape[1] == call["max_length_all"]
    for name in ("input_ids", "attention_mask"):
        if name in expected:
            case.assert_close(getattr(tokens, name), expected[name], name)
    if "select_index" in expected:  # recorded as positions counted from the end
        case.assert_close(tokens.select_index, expected["select_index"] % call["max_length_all"], "select_index")
    encoded = encoder.encode(call["prompts"])
    case.assert_close(encoded.embeds[:, None], expected["caption_embs"], "caption_embs")
    case.assert_close(encoded.mask, expected["emb_masks"], "emb_masks")
    batch = encoder.forward_tokens(*tokens)  # what a trainer calls: the whole batch at once
    case.assert_close(batch.embeds[:, None], expected["caption_embs"], "caption_embs of the whole batch")


RUNNERS = {"text_encode": run_text_encode}
FUNCTIONS: dict = {}
