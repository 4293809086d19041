"""Tiny vision-language models with random weights, saved as transformers saves them. No test is here."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "red", "cat", "two", "owls", "on", "blue", "what", "?"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
VISION |= {"image_size": 16, "initializer_range": 0.5}  # large, so that the image matters
TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT |= {"initializer_range": 0.5, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_tokenizer(with_ends: bool = True):
    """A tokenizer of whole words."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=12,
    )  # fmt: skip


def save_tiny_clip(folder: Path) -> Path:
    """A CLIP model with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(3)
    text = TEXT | {"max_position_embeddings": 12}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_tiny_blip(folder: Path) -> Path:
    """A BLIP captioner: an image in, a caption out, perhaps from a given beginning."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(1)
    text = TEXT | {"sep_token_id": 2, "max_position_embeddings": 64, "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(images, tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_tiny_llava(folder: Path) -> Path:
    """A LLaVA chat model."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(2)
    text = LlamaConfig(**TEXT, max_position_embeddings=64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=4, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        images, tiny_tokenizer(with_ends=False), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_tiny_encoder_decoder(folder: Path) -> Path:
    """A ViT encoder with a BERT decoder."""
    from transformers import BertConfig, VisionEncoderDecoderConfig, ViTConfig, ViTImageProcessor
    from transformers import VisionEncoderDecoderModel as Model

    torch.manual_seed(4)
    decoder = BertConfig(**TEXT, max_position_embeddings=64, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = Model(config)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    tiny_tokenizer(with_ends=False).save_pretrained(folder)
    return folder
