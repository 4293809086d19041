"""Runs the recorded cases of single modules of the Linear DiT, and of PAG's attention processors. Called by dit.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.layers.norms import RMSNorm
from sana.models.transformer.architecture import SanaArchitecture
from sana.models.transformer.attention import CrossAttention, LinearAttention, SoftmaxAttention, VanillaCrossAttention
from sana.models.transformer.block import SanaBlock
from sana.models.transformer.embedding import CaptionEmbedder, FinalLayer, TimestepEmbedder, timestep_embedding
from sana.models.transformer.mix_ffn import DepthwiseMlp, MixFFN, PreGluMBConv
from sana.models.transformer.position import rotary_axes, rotary_table, sincos_2d
from tests.parity.common import Case


def lite_la(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    assert arguments.get("out_dim", arguments["in_dim"]) == arguments["in_dim"]
    kept = {name: arguments[name] for name in ("eps", "qk_norm", "norm_eps") if name in arguments}
    return LinearAttention(arguments["in_dim"], arguments["heads"], **kept)


def softmax_attention(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    return SoftmaxAttention(arguments["dim"], arguments["num_heads"], qk_norm=arguments.get("qk_norm", False))


def glumbconv(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    assert not any(arguments.get("norm") or ())
    return MixFFN(
        arguments["in_features"],
        arguments["hidden_features"],
        out_dim=arguments.get("out_feature"),
        kernel_size=arguments.get("kernel_size", 3),
        use_bias=three(arguments.get("use_bias", False)),
        acts=tuple(arguments.get("act", ("silu", "silu", None))),
        dilation=arguments.get("dilation", 1),
    )


def mbconvpreglu(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    assert not any(arguments.get("norm") or ())
    return PreGluMBConv(
        arguments["in_dim"],
        arguments["mid_dim"],
        out_dim=arguments["out_dim"],
        kernel_size=arguments.get("kernel_size", 3),
        use_bias=three(arguments.get("use_bias", False)),
        acts=tuple(arguments.get("act", ("silu", "silu", None))),
    )


def three(value: bool | list[bool]) -> tuple[bool, bool, bool]:
    return (value,) * 3 if isinstance(value, bool) else tuple(value)


def cross_attention(kind: type[CrossAttention]) -> Callable[..., nn.Module]:
    def build(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
        return kind(
            arguments["d_model"], arguments["num_heads"], arguments.get("qk_norm", False), arguments.get("eps", 1e-6)
        )

    return build


def block(arguments: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The recorded constructor leaves out the kinds of attention and feed-forward network; the weights tell them."""
    kinds = {"attn_type": "flash" if "attn.qkv.bias" in weights else "linear", "ffn_type": "mlp"}
    if "mlp.inverted_conv.conv.weight" in weights:
        kinds["ffn_type"] = "glumbconv"
    elif "mlp.conv.weight" in weights:
        kinds["ffn_type"] = "dwmlp"
    return SanaBlock(SanaArchitecture.from_kwargs({**kinds, **arguments}))


BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], nn.Module]] = {
    "LiteLA": lite_la,
    "FlashAttention": softmax_attention,
    "Attention": softmax_attention,
    "GLUMBConv": glumbconv,
    "MBConvPreGLU": mbconvpreglu,
    "DWMlp": lambda a, w: DepthwiseMlp(a["in_features"], a["hidden_features"], a.get("out_features")),
    "MultiHeadCrossAttention": cross_attention(CrossAttention),
    "MultiHeadCrossVallinaAttention": cross_attention(VanillaCrossAttention),
    "CaptionEmbedder": lambda a, w: CaptionEmbedder(
        a["in_channels"], a["hidden_size"], a["uncond_prob"], num_tokens=a["token_num"]
    ),
    "TimestepEmbedder": lambda a, w: TimestepEmbedder(a["hidden_size"], a.get("frequency_embedding_size", 256)),
    "T2IFinalLayer": lambda a, w: FinalLayer(a["hidden_size"], a["patch_size"], a["out_channels"]),
    "RMSNorm": lambda a, w: RMSNorm(a["dim"], a.get("scale_factor", 1.0), a.get("eps", 1e-6)),
    "SanaMSBlock": block,
}
INPUT_ORDER = ("x", "caption", "cond", "y", "t")


def load_module(case: Case) -> nn.Module:
    """Returns the module of a case with its recorded weights."""
    arguments, weights = dict(case.constructor), case.weights()
    module = BUILDERS[arguments.pop("class")](arguments, weights)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def call_options(case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the keyword arguments that the case's call asks for."""
    call, options = case.call, {}
    if "HW" in call:
        options["HW"] = tuple(call["HW"])
    if "mask_lens" in call:
        length = inputs["cond" if "cond" in inputs else "y"].shape[-2]
        options["mask"] = torch.stack([(torch.arange(length) < own).long() for own in call["mask_lens"]])
    if "force_drop_ids" in call:
        options["force_drop_ids"] = torch.tensor(call["force_drop_ids"])
    if "latent_hw" in call:
        head_dim = case.constructor["in_dim"] // case.constructor["heads"]
        options["rotary"] = rotary_table(rotary_axes(head_dim), tuple(call["latent_hw"]))
        for table, name in zip(options["rotary"], ("cos", "sin"), strict=True):
            case.assert_close(table, case.tensor(f"mid.{name}"), name)
    return options


def run_module(case: Case) -> None:
    """Compares a module's output and, where recorded, the gradients of its inputs and parameters."""
    module = load_module(case)
    inputs = {name: value.clone().requires_grad_() for name, value in case.tensors("in.").items()}
    options = call_options(case, inputs)
    out = module(*(inputs[name] for name in INPUT_ORDER if name in inputs), **options)
    case.assert_close(out, case.tensor("out"))
    if "grad_out" not in case.tensors(""):
        return
    if "force_drop_ids" in case.call:
        # The recording ran the module without a forced drop just before and did not clear its parameters' gradients.
        plain = module(*(case.tensor(f"in.{name}") for name in INPUT_ORDER if name in inputs))
        (plain * case.tensor("grad_out")).sum().backward()
    (out * case.tensor("grad_out")).sum().backward()
    for name, expected in case.tensors("grad.").items():
        case.assert_close(inputs[name].grad, expected, f"gradient of {name}")
    parameters = dict(module.named_parameters())
    for name, expected in case.tensors("gradw.").items():
        case.assert_close(parameters[name].grad, expected, f"gradient of {name}")


def run_pag_processor(case: Case) -> None:
    """The perturbed rows stand last: a third of (uncond, cond, perturbed), half of (cond, perturbed)."""
    module, three_branches, two_branches = load_module(case), case.tensor("in.x3"), case.tensor("in.x2")
    with torch.no_grad():
        guided = module(three_branches, identity_rows=three_branches.shape[0] // 3)
        case.assert_close(guided, case.tensor("out.pagcfg_x3"), "uncond, cond, perturbed")
        halves = module(two_branches, identity_rows=two_branches.shape[0] // 2)
        case.assert_close(halves, case.tensor("out.pag_x2"), "cond, perturbed")
        case.assert_close(module(two_branches), case.tensor("out.plain_x2"), "no perturbed rows")


def run_timestep_frequencies(case: Case) -> None:
    for name, expected in case.tensors("out.").items():
        case.assert_close(timestep_embedding(case.tensor("in.t"), int(name.removeprefix("dim"))), expected, name)


def run_sincos(case: Case) -> None:
    """Names such as h3_w5_base8_interp2.0 hold the arguments."""
    for name, expected in case.tensors("out.").items():
        height, width, base, interpolation = (
            part.removeprefix(prefix)
            for part, prefix in zip(name.split("_"), ("h", "w", "base", "interp"), strict=True)
        )
        table = sincos_2d(case.call["dim"], (int(height), int(width)), float(interpolation), int(base))
        case.assert_close(table, expected, name)
