"""Every part of the benchmarks at reduced sizes: what is built compares well, on a CPU also what is meant for a GPU."""

import itertools

import pytest
import torch
from torch import nn

from sana.models.autoencoder.dc_ae import DCAEConfig
from sana.models.text_encoder.chi import CHI_PROMPT, chi_text
from tools.bench import (
    baselines,
    block_stack,
    dit,
    end_to_end,
    memory,
    operators,
    pairs,
    scaling,
    suites,
    training_step,
)
from tools.bench.harness import Deadline, compare, run_case
from tools.bench.loader import draw_photographs, feature_comparison, photograph_comparison
from tools.bench.networks import exact_step, forward_flops, random_inputs, random_transformer, transformer_arguments
from tools.bench.setting import Setting
from tools.bench.targets import TARGETS

QUICK = Setting("quick", "cpu")
TINY = {"hidden_size": 64, "num_heads": 2, "depth": 2, "caption_channels": 32, "in_channels": 4, "linear_head_dim": 32}


def passed(comparison):
    """Runs the check and every side once; returns the sides' names."""
    checks = comparison.check()
    assert checks and all(check.passed for check in checks.values()), checks
    for side in comparison.sides:
        if side.once is not None:
            side.once()
        side.run()
    return [side.name for side in comparison.sides]


def tiny_shape():
    widths = (8, 8, 8, 16, 16, 16)
    autoencoder = DCAEConfig(
        latent_channels=4, scaling_factor=0.41407, encoder_width_list=widths, encoder_depth_list=(0, 1, 1, 1, 1, 1),
        decoder_width_list=widths, decoder_depth_list=(0, 1, 1, 1, 1, 1),
    )  # fmt: skip
    gemma = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 32, "vocab_size": 1000,
    }  # fmt: skip
    return pairs.Shape("0.6B", 512, TINY, autoencoder, gemma)


@pytest.fixture(scope="module")
def judged():
    pytest.importorskip("diffusers")
    return end_to_end.random_pair(tiny_shape, "cpu", 2)


@pytest.mark.parametrize("part", [block_stack, training_step, dit])
def test_networks_agree_with_diffusers(part):
    pytest.importorskip("diffusers")
    for case in part.cases(QUICK):
        assert passed(case.build())[-2:] == ["ours", "diffusers"]


def test_diffusers_blocks_work_without_their_captions_alone():
    """The caption projection is taken out of diffusers' side only where it is timed; the result stays the same."""
    pytest.importorskip("diffusers")
    from tools.bench.networks import diffusers_step, diffusers_transformer

    arguments = transformer_arguments("0.6B", 512, 2) | block_stack.REDUCED
    theirs = diffusers_transformer(random_transformer(arguments, "cpu", torch.float32))
    inputs = random_inputs(arguments, 1, 256, "cpu", torch.float32)
    whole = diffusers_step(theirs, inputs)()
    reduced = block_stack._without_captions(theirs, inputs)
    assert isinstance(theirs.caption_projection, nn.Identity)
    assert torch.equal(diffusers_step(theirs, reduced)(), whole)


def test_random_weights_make_every_part_of_a_block_matter():
    arguments = transformer_arguments("0.6B", 512, 2) | block_stack.REDUCED
    model = random_transformer(arguments, "cpu", torch.float32)
    inputs = random_inputs(arguments, 1, 256, "cpu", torch.float32)
    before = exact_step(model, inputs)
    for name in ("attn.proj", "cross_attn.proj", "mlp.point_conv.conv"):
        weights = [block.get_submodule(name).weight for block in model.blocks]
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.zero_()
        assert not compare(exact_step(model, inputs), before, tolerance=0.1).passed, name
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)


def test_the_text_has_300_tokens_of_which_60_are_read():
    inputs = random_inputs(transformer_arguments("0.6B", 512), 2, 512, "cpu", torch.float32)
    assert inputs.text.shape == (2, 300, 2304) and inputs.mask.sum(1).tolist() == [60, 60]
    assert inputs.latents.shape == (2, 32, 16, 16) and len(inputs.timesteps) == 20


def test_operations_are_those_that_a_counter_finds():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = transformer_arguments("0.6B", 512, 2) | {"cross_attn_type": "vanilla"}  # the counter sees its products
    model = random_transformer(arguments, "cpu", torch.float32)
    inputs = random_inputs(arguments, 1, 512, "cpu", torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for backend in model.modules():
            if hasattr(backend, "backend"):
                backend.backend = "reference"
        model(inputs.latents, inputs.timesteps[0], inputs.text[:, None])  # all 300 tokens
    assert forward_flops("0.6B", 512, 2) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", list(operators.OPERATORS))
def test_operators_agree_with_every_other_form(name):
    for case in operators.cases(QUICK):
        if case.name.startswith(name.replace("_", " ")):
            comparison = case.build()
            assert {"ours", "eager"} <= set(passed(comparison))
            assert comparison.work.bytes > 0


@pytest.mark.parametrize("name", list(operators.OPERATORS))
def test_gradients_of_operators_agree_too(name):
    shape = operators.Shape("tiny", 64, 4, 2)
    comparison = operators._build(operators.OPERATORS[name], shape, "fp32", "backward", QUICK, False)
    passed(comparison)
    forward = operators._build(operators.OPERATORS[name], shape, "fp32", "forward", QUICK, False)
    assert comparison.work.bytes > forward.work.bytes


def test_bytes_of_linear_attention_are_one_read_and_one_write():
    shape = operators.Shape("tiny", 64, 4, 2)
    tokens = 2 * 16 * 64 * 4  # bytes of an activation in float32
    work = [
        operators._build(operators._linear_attention, shape, "fp32", direction, QUICK, False).work.bytes
        for direction in ("forward", "backward")
    ]
    assert work == [4 * tokens, 7 * tokens]


def test_the_chunked_form_takes_any_number_of_tokens():
    qkv = torch.randn(2, 150, 3 * 64, generator=torch.Generator().manual_seed(0))
    whole, chunked = baselines.linear_attention(qkv, 2), baselines.chunked_linear_attention(qkv, 2)
    assert compare(chunked, whole).passed


def test_scaling_compares_linear_attention_with_its_judge():
    assert passed(scaling.build_comparison(4, "fp32", QUICK)) == [scaling.LINEAR, scaling.SOFTMAX]


def test_the_loader_reads_alike(tmp_path):
    comparison = photograph_comparison(tmp_path, 2, 96, 64)
    assert passed(comparison) == ["ours (fast)", "ours (exact)", "PIL, official transforms"]
    assert passed(feature_comparison(tmp_path, 3)) == ["ours"]
    assert len(list(draw_photographs(tmp_path, 2, 96, 64).glob("*.jpg"))) == 2


def test_the_bundled_model_makes_the_same_picture_in_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    for case in end_to_end.cases(Setting("quick", "cpu", tmp_path)):
        assert passed(case.build()) == ["ours", "diffusers"]


def test_random_pipelines_as_on_a_gpu(judged):
    comparison = end_to_end.batch_comparison(judged, 2, compiled=False)
    assert passed(comparison) == ["ours", "diffusers"]
    assert comparison.sides[0].run().shape == (2, 3, 512, 512)
    ours, theirs = judged.pair.ours, judged.pair.theirs
    broken = next(theirs.pipeline.transformer.parameters())
    kept = broken.clone()
    broken.normal_()  # the check would see other weights
    assert not end_to_end.batch_comparison(judged, 1, compiled=False).check()["diffusers"].passed
    broken.copy_(kept)
    assert ours.pixels == theirs.pixels == 512


def test_the_sides_own_their_networks(judged):
    mine, other = judged.pair.ours.pipeline, judged.pair.theirs.pipeline
    pointers = {parameter.data_ptr() for parameter in mine.transformer.parameters()}
    pointers |= {parameter.data_ptr() for parameter in mine.text_encoder.model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in other.transformer.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in other.text_encoder.parameters()}


def test_memory_of_each_side_alone_as_on_a_gpu():
    pytest.importorskip("diffusers")
    comparison = memory.gpu_comparison("0.6B", QUICK, tiny_shape(), steps=1)
    first, second = (side.run() for side in comparison.sides)
    assert first.shape == second.shape == (1, 3, 512, 512)
    assert "memory_only" in comparison.facts


def test_prompts_never_repeat():
    many = list(itertools.islice(pairs.prompts(), 20_000))
    assert len(set(many)) == len(many)


def test_the_random_tokenizer_cuts_the_instruction_as_the_released_one():
    tokens = len(pairs.random_tokenizer().encode(chi_text(CHI_PROMPT)))
    assert abs(tokens - pairs.CHI_TOKENS) <= 3


def test_suites_answer_every_target():
    keys = {
        suite: {case.key for case in suites.plan(Setting(suite, "cpu")) if case.key} for suite in ("cpu",)
    }  # fmt: skip
    gpu = Setting("gpu", "cpu")
    object.__setattr__(gpu, "device", "cuda")  # the plan needs no GPU
    keys["gpu"] = {case.key for case in suites.plan(gpu) if case.key}
    for target in TARGETS:
        assert target.key in keys["cpu" if target.device == "cpu" else "gpu"], target
    first = [case.key for case in suites.plan(gpu)]
    assert first[:2] == ["end_to_end.0.6B"] * 2


def test_missing_diffusers_is_a_skip_by_name(monkeypatch):
    real = pairs.require_diffusers.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "diffusers" else real(name, *rest)
    )
    result = run_case(block_stack.cases(QUICK)[0], 1, Deadline(60))
    assert (result.status, "diffusers is not installed" in result.reason) == ("skipped", True)
