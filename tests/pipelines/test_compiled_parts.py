"""The denoising loop as a function of tensors, compiled blocks, the fast decoder's copy, and the version of weights."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance
from sana.models.autoencoder.base import Autoencoder
from sana.models.transformer.sana import SanaMS
from sana.pipelines.compiled_parts import DenoisingLoop, compile_blocks, fast_decoder, weights_version
from tests.tolerance import assert_rms_close

SMALL = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "linear_head_dim": 8,
    "in_channels": 4,
    "caption_channels": 16,
    "model_max_length": 20,
    "input_size": 8,
    "patch_size": 1,
    "pred_sigma": False,
    "use_pe": False,
}
PAG = Guidance("classifier-free_PAG", 4.5, 2.0)


def transformer(**options):
    return SanaMS(**{**SMALL, **options}).eval().requires_grad_(False)


def inputs(rows=2, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 20, dtype=torch.long)
    mask[:, 13:] = 0
    tensors = {
        "noise": torch.randn(rows, 4, 8, 6, generator=generator),
        "prompt_embeds": torch.randn(rows, 20, 16, generator=generator),
        "prompt_mask": mask,
        "null_embeds": torch.randn(rows, 20, 16, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


class CopiesBetweenDevices(TorchDispatchMode):
    """Collects every operation whose tensors, numbers of no axes apart from it, lie on two devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.to)
        if len({one.device for one in (tensors if copies else [t for t in tensors if t.ndim])}) > 1:
            self.found.append(str(func))
        return out


def test_the_check_below_sees_copies_to_a_device():
    with torch.no_grad(), CopiesBetweenDevices() as copies:
        torch.ones(3).to("meta")
        torch.empty(3, device="meta").copy_(torch.ones(3))
        torch.tensor(1.0).to("meta")
        torch.ones(3, device="meta") * torch.tensor(2.0)
    assert len(copies.found) == 3


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler", "dpm-solver"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_pe": True}, {"use_pe": True, "pos_embed_type": "flux_rope"}],
    ids=["plain", "positions", "rope"],
)
def test_the_loop_neither_waits_for_the_device_nor_copies_to_it(sampler, options):
    """The device "meta" stands in for a GPU: what needs a value from it raises, and copies to it are seen.

    A first run may fill caches, as the trial runs before a capture do.
    """
    model = transformer(**options).to("meta")
    loop = DenoisingLoop(sampler, (0.99, 0.7, 0.4, 0.1), PAG, (1,))
    given = inputs(device="meta")
    with torch.no_grad():
        loop.run(model, **given)
        with CopiesBetweenDevices() as copies:
            latents = loop.run(model, **given)
    assert latents.shape == given["noise"].shape and latents.is_meta
    assert copies.found == []


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler", "dpm-solver"])
@pytest.mark.parametrize("guidance", [PAG, Guidance(guidance_scale=1.0)])
def test_the_loop_is_the_sampler_with_the_plain_transformer(sampler, guidance):
    model, given, times = transformer(), inputs(), torch.tensor([0.95, 0.6, 0.3, 0.05])
    rows = len(given["noise"])

    def velocity(latents, sigma):
        def call(embeds, **options):
            timestep = (sigma * 1000).expand(rows)
            return model(latents, timestep, embeds[:, None], mask=given["prompt_mask"], **options)

        outputs = {"cond": call(given["prompt_embeds"])}
        if guidance.guidance_scale != 1:
            outputs["uncond"] = call(given["null_embeds"])
        if guidance is PAG:
            outputs["perturbed"] = call(given["prompt_embeds"], pag_layers=(0, 2), pag_rows=rows)
        return guidance.combine(outputs)

    with torch.no_grad():
        wanted = SAMPLERS[sampler].sample(velocity, given["noise"], times)
        result = DenoisingLoop(sampler, tuple(times.tolist()), guidance, (0, 2)).run(model, **given)
    assert_rms_close(result, wanted)


def test_a_step_cache_leaves_steps_out():
    model, given = transformer(), inputs()
    times, calls = (0.95, 0.6, 0.3, 0.05), []
    model.final_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for evaluate in (None, (True, False, True)):
            DenoisingLoop("flow_euler", times, Guidance(guidance_scale=1.0), evaluate=evaluate).run(model, **given)
    assert len(calls) == 2 * (3 + 2), "rows one by one on a CPU"


def test_all_blocks_share_one_compilation():
    model, given = transformer(), inputs(rows=1)
    loop = DenoisingLoop("flow_euler", (0.95, 0.6, 0.3), PAG, (1,))
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = loop.run(model, **given)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        blocks = compile_blocks(model, backend="aot_eager")
        result = loop.run(model, **given)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert blocks == list(model.blocks)
    assert_rms_close(result, wanted)
    assert compiled == 2, "a block with attention and one with the identity of PAG, for three blocks"


class OwnDecoder(Autoencoder):
    """An autoencoder of one convolution."""

    scaling_factor, latent_channels, downsample_factor = 0.5, 4, 1

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 3, 1)

    def raw_decode(self, latents):
        return self.layer(latents)


def test_the_fast_decoder_is_a_copy(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) + 1000)
    plain, latents = OwnDecoder().eval(), torch.randn(1, 4, 8, 8)
    wanted = plain.decode(latents)
    with torch.inference_mode():
        fast = fast_decoder(plain)
    assert_rms_close(fast.decode(latents), wanted.detach() + 1000, torch.bfloat16)
    assert fast.dtype == torch.bfloat16 and not fast.layer.weight.is_inference()
    assert plain.dtype == torch.float32 and torch.equal(plain.decode(latents), wanted)


def test_the_version_tells_moved_weights_and_other_kernels():
    model = transformer()
    version = weights_version(model)
    assert weights_version(model) == version
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(2)
    assert weights_version(model) == version, "a graph sees what is changed in place"
    assert weights_version(copy.deepcopy(model)) != version
    model.blocks[1].attn.backend = "reference"
    assert weights_version(model) != version
    version = weights_version(model)
    model.to(torch.float64)
    assert weights_version(model) != version
    version = weights_version(model)
    model.blocks[2].mlp = copy.deepcopy(model.blocks[2].mlp)
    assert weights_version(model) != version
