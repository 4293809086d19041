"""Layerwise casting: what is stored in 8 bits, with offload and without, and how far the picture is from the exact."""

import pytest
import torch

from sana.pipelines.sana_pipeline import SanaPipeline
from tests.pipelines.offloaded import BUNDLED, CALL, PICTURE, psnr, put_away

pytestmark = pytest.mark.usefixtures("unpacked")


def test_casting_to_the_same_dtype_changes_nothing(plain, open_pipeline):
    pipeline = open_pipeline().enable_layerwise_casting(torch.float32, text_encoder=True)
    assert torch.equal(pipeline(**CALL), plain(**CALL))
    assert pipeline.transformer.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_what_is_cast(open_pipeline):
    pipeline = open_pipeline().enable_layerwise_casting(skip=["blocks.1."], text_encoder=True)
    stored = {name for name, tensor in pipeline.transformer.state_dict().items() if tensor.dtype.itemsize == 1}
    assert stored == {
        "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "blocks.0.cross_attn.q_linear.weight",
        "blocks.0.cross_attn.kv_linear.weight", "blocks.0.cross_attn.proj.weight",
        "blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.mlp.point_conv.conv.weight",
    }  # fmt: skip
    assert pipeline.transformer.dtype == torch.float32
    pipeline(**CALL)
    text = {name for name, tensor in pipeline.text_encoder.model.state_dict().items() if tensor.dtype.itemsize == 1}
    assert text and all("layers." in name and "norm" not in name for name in text)
    assert pipeline.text_encoder.dtype == torch.float32


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_casting_goes_with_offload_in_either_order(open_pipeline, kind):
    wanted = open_pipeline().enable_layerwise_casting(text_encoder=True)(**CALL)
    first, second = open_pipeline(), open_pipeline().enable_layerwise_casting(text_encoder=True)
    put_away(first, kind)
    first.enable_layerwise_casting(text_encoder=True)
    put_away(second, kind)
    for pipeline in (first, second):
        assert torch.equal(pipeline(**CALL), wanted)
        pipeline.disable_offload()
        assert pipeline.offload == "none" and torch.equal(pipeline(**CALL), wanted)
        assert pipeline.transformer.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn


def test_casting_that_cannot_be_done(open_pipeline):
    pipeline = open_pipeline()
    with pytest.raises(ValueError, match="needs floating-point dtypes, not torch.int8"):
        pipeline.enable_layerwise_casting(torch.int8)
    pipeline.enable_layerwise_casting()
    with pytest.raises(ValueError, match="stored in .* already"):
        pipeline.enable_layerwise_casting(torch.float16)
    quantised = open_pipeline()
    pytest.importorskip("torchao")
    quantised.quantize("int8")
    with pytest.raises(ValueError, match="finds nothing to store in the transformer; is it quantised already"):
        quantised.enable_layerwise_casting()
    assert torch.isfinite(quantised(**CALL)).all()


def test_weights_in_8_bits_make_nearly_the_same_picture():
    """The bundled model: 48 dB, an error that no viewer sees."""
    pipeline = SanaPipeline.from_pretrained(BUNDLED, device="cpu")
    wanted = pipeline(**PICTURE)
    pipeline.enable_layerwise_casting()
    assert pipeline.transformer.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert 40 < psnr(pipeline(**PICTURE), wanted) < 60
