"""Makes the small Gemma-2 text encoder of the bundled model: a BPE tokenizer learnt from captions, random weights.

Official Sana uses a released Gemma-2 and never trains it; this one is trained jointly with the transformer.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0-3, as in Gemma


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE with byte fallback, so that any text (Chinese, emoji) round-trips.

    `<eos>` ends every text: Gemma is causal, and this is the one token whose state has seen the whole prompt.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    words = (("▁" * (i > 0)) + word for caption in captions for i, word in enumerate(caption.split(" ")))
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_plain_bytes(tokenizer), padding_side="right", clean_up_tokenization_spaces=False,
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def _with_plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks the byte tokens as special, and decoding would leave them out: makes them ordinary tokens."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def create_text_encoder(folder: Path, captions: Iterable[str], *, vocab_size: int = 760, **config) -> None:
    """Writes a fresh tokenizer and a randomly initialised Gemma-2 to a Hugging Face folder.

    Args:
        folder: where to.
        captions: text to learn the vocabulary from; include the CHI prompt.
        vocab_size: tokens in all, of which 260 are special tokens and bytes.
        **config: fields of `Gemma2Config`.
    """
    from transformers import Gemma2Config, Gemma2Model  # brings in Triton where that is installed

    tokenizer = train_tokenizer(captions, vocab_size)
    shape = {
        "hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 40, "intermediate_size": 448, "query_pre_attn_scalar": 40, "max_position_embeddings": 1024,
    }  # fmt: skip
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = Gemma2Model(Gemma2Config(**{**shape, **tokens, **config}))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def random_gemma2(hidden_size: int, **config) -> tuple[Any, PreTrainedTokenizerFast]:
    """A randomly initialised Gemma-2 with the layers of the 2B model, and a small tokenizer: for tests of speed.

    Args:
        hidden_size: width of the embeddings.
        **config: other fields of `Gemma2Config`.
    """
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = train_tokenizer(["a picture of a cat", "two dogs on a red background"], 300)
    shape = {
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "intermediate_size": 4 * hidden_size, "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2,
    }  # fmt: skip
    return Gemma2Model(Gemma2Config(**{**shape, "hidden_size": hidden_size, **config})), tokenizer
