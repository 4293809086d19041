"""The pipeline: both ways to load, what a call returns, batches equal to single runs, one transformer call a step."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from torchvision.utils import save_image

from sana.config import config_to_dict
from sana.models.autoencoder.base import Autoencoder
from sana.models.pipeline_folder import ExportOptions, export_pipeline
from sana.models.weights import CheckpointError, load_state_dict, read_metadata
from sana.pipelines import loading
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.registry import UnknownNameError
from tests.parity.runners.pipeline import build_pipeline
from tests.tiny_model import recorded_case

PROMPTS = ["a cat", "portrait of an old fisherman by the sea, oil painting", "雪山日出", ""]
SHORT = {"num_inference_steps": 3, "progress_bar": False}


def count_calls(pipeline: SanaPipeline) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    """Returns a list of batch sizes, one entry a call of the transformer."""
    calls: list[int] = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls, handle


@pytest.mark.parametrize(
    ("options", "branches"),
    [({}, 2), ({"guidance_scale": 1.0}, 1), ({"pag_scale": 2.0}, 3), ({"pag_scale": 2.0, "guidance_scale": 1.0}, 2)],
)
def test_one_transformer_call_a_step_for_the_whole_batch(pipeline, options, branches):
    calls, handle = count_calls(pipeline)
    pipeline(PROMPTS, seed=3, num_images_per_prompt=2, output_type="latent", **SHORT, **options)
    handle.remove()
    assert calls == [8 * branches] * 3


def test_texts_and_times_are_prepared_once(pipeline, monkeypatch):
    """Whatever the number of steps: times all at once, and texts once for each set of branches."""
    times, texts = [], []
    model = pipeline.transformer
    cache_time, cache_text = model.cache_time, model.cache_text
    monkeypatch.setattr(model, "cache_time", lambda t: times.append(len(t)) or cache_time(t))
    monkeypatch.setattr(model, "cache_text", lambda y, mask, **k: texts.append(len(y)) or cache_text(y, mask, **k))
    pipeline(PROMPTS[:1], seed=3, output_type="latent", **SHORT)
    assert (times, texts) == ([3], [2])


def test_guidance_interval_leaves_the_null_branch_out(pipeline):
    calls, handle = count_calls(pipeline)
    pipeline(PROMPTS[:1], seed=3, interval_guidance=(0.0, 0.5), output_type="latent", **SHORT)
    handle.remove()
    assert calls == [1, 1, 1] or (calls[0] == 1 and set(calls) == {1, 2})


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler"])
@pytest.mark.parametrize("pag_scale", [1.0, 1.5])
def test_image_i_of_a_batch_is_its_single_run_bitwise(pipeline, sampler, pag_scale):
    options = {"sampler": sampler, "pag_scale": pag_scale, "height": 96, "width": 64, **SHORT}
    together = pipeline(PROMPTS, seed=11, **options)
    assert together.shape == (4, 3, 96, 64)
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, seed=11 + index, **options)
        assert torch.equal(alone[0], together[index]), f"image {index} differs from its single run"


def test_batch_size_and_neighbours_change_nothing(pipeline):
    wanted = pipeline("a red fox", seed=[5], **SHORT)[0]
    for others in (["x"], ["a much longer prompt with many more words than the first"] * 4):
        batch = pipeline(["a red fox", *others], seed=[5, *range(90, 90 + len(others))], **SHORT)
        assert torch.equal(batch[0], wanted)


def test_generators_of_the_images(pipeline):
    seeded = pipeline(PROMPTS[:2], seed=[7, 8], **SHORT)
    listed = pipeline(PROMPTS[:2], generator=[torch.Generator().manual_seed(s) for s in (7, 8)], **SHORT)
    assert torch.equal(seeded, listed)
    single = pipeline("a cat", generator=torch.Generator().manual_seed(7), **SHORT)
    assert torch.equal(single[0], seeded[0])
    assert not torch.equal(seeded[0], pipeline("a cat", seed=9, **SHORT)[0])


def test_one_generator_is_used_up_prompt_after_prompt(pipeline):
    generator = torch.Generator().manual_seed(4)
    first, second = (pipeline(p, generator=generator, num_images_per_prompt=2, **SHORT) for p in PROMPTS[:2])
    both = pipeline(PROMPTS[:2], generator=torch.Generator().manual_seed(4), num_images_per_prompt=2, **SHORT)
    assert torch.equal(both, torch.cat([first, second]))


def test_without_a_seed_two_calls_differ_and_follow_the_global_one(pipeline):
    torch.manual_seed(1)
    first, second = (pipeline("a cat", output_type="latent", **SHORT) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, pipeline("a cat", output_type="latent", **SHORT))


def test_a_negative_prompt_does_not_stay(pipeline):
    plain = pipeline("a cat", seed=1, **SHORT)
    negative = pipeline("a cat", seed=1, negative_prompt="blurry", **SHORT)
    assert not torch.equal(plain, negative)
    assert torch.equal(plain, pipeline("a cat", seed=1, **SHORT))
    listed = pipeline(["a cat", "a cat"], seed=[1, 1], negative_prompt=["", "blurry"], **SHORT)
    assert torch.equal(listed, torch.cat([plain, negative]))


def test_output_types_agree(pipeline, tmp_path):
    tensor = pipeline(PROMPTS[:2], seed=1, **SHORT)
    array = pipeline(PROMPTS[:2], seed=1, output_type="np", **SHORT)
    pictures = pipeline(PROMPTS[:2], seed=1, output_type="pil", **SHORT)
    latents = pipeline(PROMPTS[:2], seed=1, output_type="latent", **SHORT)
    expected = (tensor.clamp(-1, 1) + 1) / 2
    assert tensor.dtype == torch.float32 and latents.shape == (2, 4, 2, 2)
    assert np.allclose(array, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert np.abs(np.asarray(pictures[1]) / 255 - array[1]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(pipeline.decode(latents), tensor)
    save_image(tensor, tmp_path / "x.png", nrow=1, normalize=True, value_range=(-1, 1))
    assert (tmp_path / "x.png").stat().st_size > 0


def test_latents_replace_the_noise(pipeline):
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(6))
    assert torch.equal(pipeline("a cat", latents=noise, **SHORT), pipeline("a cat", seed=6, **SHORT))


def test_embeddings_replace_the_text_encoder(pipeline, model_folder):
    prompts = ["a cat", "two dogs"]
    embeds, null = pipeline.encode_prompts(prompts), pipeline.encode_prompts([""], null=True)
    without = SanaPipeline.from_pretrained(model_folder, device="cpu")
    without.config.text_encoder.text_encoder_name = "/nowhere"
    made = without(
        prompt_embeds=embeds.embeds,
        prompt_attention_mask=embeds.mask,
        negative_prompt_embeds=null.embeds,
        seed=2,
        **SHORT,
    )
    assert torch.equal(made, pipeline(prompts, seed=2, **SHORT))


def test_the_callback_sees_every_step_and_may_change_the_latents(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe is pipeline, step, timestep, tuple(tensors["latents"].shape)))

    plain = pipeline("a cat", seed=1, callback_on_step_end=watch, output_type="latent", **SHORT)
    assert [entry[:2] for entry in seen] == [(True, 0), (True, 1), (True, 2)]
    assert 1000 >= seen[0][2] > seen[1][2] > seen[2][2] > 0 and seen[0][3] == (1, 4, 2, 2)
    zeroed = pipeline(
        "a cat", seed=1, output_type="latent",
        callback_on_step_end=lambda pipe, step, time, tensors: {"latents": tensors["latents"] * 0}, **SHORT,
    )  # fmt: skip
    assert torch.count_nonzero(zeroed) == 0 and torch.count_nonzero(plain) > 0


def test_binning_generates_a_trained_shape_and_cuts_it(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.config.model, "image_size", 256)
    shapes = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[-2:]))
    image = pipeline("a cat", height=100, width=200, seed=1, num_inference_steps=1, progress_bar=False)
    handle.remove()
    assert image.shape == (1, 3, 100, 200)
    assert set(shapes) == {(6, 11)}  # the 256 table's 176 x 352, at the nearest multiple of 32


def test_both_ways_to_load_agree(pipeline, model_folder, tmp_path):
    wanted = pipeline("a cat", seed=1, **SHORT)
    single = SanaPipeline.from_pretrained(model_folder / "model.safetensors", device="cpu")
    assert torch.equal(single("a cat", seed=1, **SHORT), wanted)
    torch.save({"state_dict": load_state_dict(model_folder)}, tmp_path / "weights.pth")
    config = copy.deepcopy(pipeline.config)
    for given in (config, config_to_dict(config)):
        two_steps = SanaPipeline(given, device="cpu")
        assert two_steps.from_pretrained(str(tmp_path / "weights.pth")) is two_steps
        assert torch.equal(two_steps("a cat", seed=1, **SHORT), wanted)


def test_a_moved_model_folder_still_finds_its_parts(model_folder, pipeline, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = SanaPipeline.from_pretrained("elsewhere", device="cpu")
    assert torch.equal(moved("a cat", seed=1, **SHORT), pipeline("a cat", seed=1, **SHORT))


def test_a_large_network_is_built_without_initialising_it(model_folder, pipeline, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", lambda weight: weight.is_meta or pytest.fail("initialised"))
    large = SanaPipeline.from_pretrained(model_folder, device="cpu")
    assert torch.equal(large("a cat", seed=1, **SHORT), pipeline("a cat", seed=1, **SHORT))


@pytest.mark.parametrize("foreign", [False, True])
def test_a_diffusers_folder_is_a_model_too(model_folder, pipeline, tmp_path, foreign):
    """Ours says everything; one that others wrote lacks the training's null caption, CHI and the image size."""
    export_pipeline(
        tmp_path / "diffusers",
        load_state_dict(model_folder),
        read_metadata(model_folder),
        ExportOptions(full=True, vae=str(model_folder / "vae"), text_encoder=str(model_folder / "text_encoder")),
    )
    if foreign:
        (tmp_path / "diffusers/transformer/sana_extra.safetensors").unlink()
    loaded = SanaPipeline.from_pretrained(tmp_path / "diffusers", device="cpu")
    prompt = pipeline.encode_prompts(["a cat"])
    options = {"prompt_embeds": prompt.embeds, "prompt_attention_mask": prompt.mask, "seed": 1, **SHORT}
    if foreign:
        options |= {"height": 64, "width": 64, "use_resolution_binning": False}
        loaded.config.text_encoder.model_max_length = 20
    assert torch.equal(loaded(**options), pipeline("a cat", seed=1, **SHORT))


def test_official_weights_alone_ask_for_a_config(model_folder, tmp_path):
    torch.save({"state_dict": load_state_dict(model_folder)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not say which model it is"):
        SanaPipeline.from_pretrained(tmp_path / "weights.pth")


def test_to_moves_and_casts(model_folder):
    moved = SanaPipeline.from_pretrained(model_folder, device="cpu").to("cpu", torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert {p.dtype for p in moved.transformer.parameters()} == {torch.bfloat16}
    assert moved.text_encoder.dtype == torch.bfloat16
    assert moved.autoencoder.dtype == torch.float32
    assert torch.isfinite(moved("a cat", seed=1, **SHORT)).all()


def test_to_takes_names_as_torch_does(model_folder):
    moved = SanaPipeline.from_pretrained(model_folder, device="cpu").to(device="cpu", dtype=torch.bfloat16)
    assert (moved.device.type, moved.dtype) == ("cpu", torch.bfloat16)
    for name in ("no_such_device", "cuda:77"):
        with pytest.raises(ValueError, match=name):
            moved.to(name)


def test_the_weights_hash_follows_the_weights(model_folder, pipeline):
    other = SanaPipeline.from_pretrained(model_folder, device="cpu")
    assert other.weights_hash() == pipeline.weights_hash()
    with torch.no_grad():
        next(other.transformer.parameters()).view(-1)[0] += 1
    other.to("cpu")
    assert other.weights_hash() != pipeline.weights_hash()


BAD_CALLS = [
    ({}, "Give prompt or prompt_embeds"),
    ({"prompt": []}, "prompt must be"),
    ({"prompt": "x", "height": 0}, "height must be"),
    ({"prompt": "x", "height": -1}, "height must be"),
    ({"prompt": "x", "width": 10**9}, "width must be"),
    ({"prompt": "x", "width": 64.0}, "width must be"),
    ({"prompt": "x", "height": 100, "use_resolution_binning": False}, "multiple of 32; use 96 or 128"),
    ({"prompt": "x", "guidance_scale": math.nan}, "guidance_scale must be"),
    ({"prompt": "x", "guidance_scale": math.inf}, "guidance_scale must be"),
    ({"prompt": "x", "pag_scale": math.nan}, "pag_guidance_scale must be"),
    ({"prompt": "x", "pag_scale": 0.5}, "has no effect"),
    ({"prompt": "x", "pag_scale": 2.0, "pag_guidance_scale": 3.0}, "two names"),
    ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps must be"),
    ({"prompt": "x", "num_images_per_prompt": 0}, "num_images_per_prompt must be"),
    ({"prompt": "x", "interval_guidance": (0.8, 0.2)}, "interval_guidance"),
    ({"prompt": "x", "interval_guidance": (0.0, math.nan)}, "interval_guidance"),
    ({"prompt": "x", "flow_shift": 0.0}, "flow_shift must be"),
    ({"prompt": "x", "output_type": "jpeg"}, "output_type must be"),
    ({"prompt": "x", "seed": -1}, "seed must be"),
    ({"prompt": "x", "seed": [1, 2]}, "2 seeds were given for 1 images"),
    ({"prompt": "x", "seed": 1, "generator": torch.Generator()}, "give one of them"),
    ({"prompt": ["x", "y"], "generator": [torch.Generator()]}, "1 generators were given for 2"),
    ({"prompt": ["x", "y"], "negative_prompt": ["a"] * 3}, "3 negative prompts were given for 2"),
    ({"prompt": "x", "latents": torch.zeros(1, 4, 3, 3)}, "latents must have the shape"),
    ({"prompt": "x", "latents": torch.full((1, 4, 2, 2), math.nan)}, "not finite"),
    ({"prompt": "x", "max_timesteps": 1.5}, "act in Sprint models"),
    ({"prompt": "x", "sampler": "scm"}, "needs a model that predicts trigflow"),
    ({"prompt": "x", "sampler": "dpm-solver"}, "needs a model that predicts noise"),
    ({"prompt_embeds": torch.zeros(1, 20, 32)}, "belong together"),
    (
        {"prompt_embeds": torch.zeros(1, 20, 32), "prompt_attention_mask": torch.ones(1, 9)},
        "prompt_attention_mask must have the shape",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_arguments_are_named(pipeline, arguments, message):
    calls, handle = count_calls(pipeline)
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**arguments)
    handle.remove()
    assert not calls and "\n" not in str(caught.value)


def test_an_unknown_sampler_suggests_the_nearest(pipeline):
    with pytest.raises(UnknownNameError, match="Did you mean 'flow_dpm-solver'"):
        pipeline("x", sampler="flow_dpmsolver")


def test_an_unknown_argument_is_an_error(pipeline):
    with pytest.raises(TypeError, match="guidance_scal"):
        pipeline("x", guidance_scal=3.0)


def test_pag_needs_linear_attention_and_existing_blocks(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.config.model, "pag_applied_layers", [8])
    with pytest.raises(ValueError, match="pag_applied_layers"):
        pipeline("x", pag_scale=2.0, **SHORT)
    monkeypatch.setattr(pipeline.config.model, "attn_type", "flash")
    with pytest.raises(ValueError, match="attn_type 'linear'"):
        pipeline("x", pag_scale=2.0, **SHORT)


def test_a_pipeline_without_weights_says_so(pipeline):
    with pytest.raises(ValueError, match="from_pretrained"):
        SanaPipeline(pipeline.config)("x")


def test_non_finite_values_name_the_first_bad_layer(model_folder):
    broken = SanaPipeline.from_pretrained(model_folder, device="cpu")
    bias = broken.transformer.blocks[1].cross_attn.proj.bias
    bias.data[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"transformer at timestep .*blocks\.1\.cross_attn\.proj"):
        broken("a cat", seed=1, **SHORT)
    bias.data[0] = 0.0
    next(broken.autoencoder.decoder.project_in.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"autoencoder's decoder .*project_in"):
        broken("a cat", seed=1, **SHORT)


def test_the_autoencoder_may_be_exchanged(model_folder):
    class Flat(Autoencoder):
        scaling_factor, latent_channels, downsample_factor = 1.0, 4, 32

        def raw_decode(self, latents):
            return torch.zeros(len(latents), 3, latents.shape[-2] * 32, latents.shape[-1] * 32)

    changed = SanaPipeline.from_pretrained(model_folder, device="cpu")
    flat = Flat()
    flat.weight = torch.nn.Parameter(torch.zeros(1))
    changed.autoencoder = flat
    assert torch.count_nonzero(changed("x", seed=0, **SHORT)) == 0


def test_vae_and_text_are_those_of_the_recorded_pipeline(pipeline):
    """The saved and loaded folder computes what the networks computed before they were saved."""
    recorded = build_pipeline(recorded_case("e2e/cfg_8"))
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(recorded.autoencoder.decode(latents), pipeline.autoencoder.decode(latents))
