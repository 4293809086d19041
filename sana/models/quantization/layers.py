"""Which layers of a network are quantised and which stay exact: patterns, by kind of network.

A linear layer or convolution that no pattern names is an error, so that a new kind of layer is decided on and not
overlooked. Patterns are those of `fnmatch`, where `*` stands for dots too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class LayerTable:
    """What happens to the linear layers and convolutions of one kind of network."""

    quantized: tuple[str, ...]
    exact: tuple[str, ...]


LAYERS = {
    "transformer": LayerTable(
        quantized=(
            "*.attn.qkv",
            "*.attn.proj",
            "*.cross_attn.q_linear",
            "*.cross_attn.kv_linear",
            "*.cross_attn.proj",
            "*.mlp.inverted_conv",  # 1x1 convolutions, which are linear layers over tokens
            "*.mlp.point_conv",
            "*.mlp.fc1",
            "*.mlp.fc2",
        ),
        exact=(
            "x_embedder.proj",  # one product of 32 channels a picture: what is lost here reaches every layer
            "t_embedder.mlp.*",  # times act through shifts and gates on every token at once
            "cfg_embedder.mlp.*",
            "t_block.1",  # as above; read once a step, or once a picture where times are prepared
            "y_embedder.y_proj.*",  # made once a prompt
            "*.mlp.depth_conv",  # depthwise: no large matrix, 9 numbers a channel
            "*.mlp.conv",
            "controlnet.*.before_proj",  # its output is added to the main branch as it is
            "controlnet.*.after_proj",
            "final_layer.linear",  # its error is the picture's
            "logvar_linear",
        ),
    ),
    "text_encoder": LayerTable(
        quantized=(
            "*.self_attn.q_proj",  # Gemma, Qwen
            "*.self_attn.k_proj",
            "*.self_attn.v_proj",
            "*.self_attn.o_proj",
            "*.mlp.gate_proj",
            "*.mlp.up_proj",
            "*.mlp.down_proj",
            "*.SelfAttention.q",  # T5
            "*.SelfAttention.k",
            "*.SelfAttention.v",
            "*.SelfAttention.o",
            "*.DenseReluDense.wi",
            "*.DenseReluDense.wi_0",
            "*.DenseReluDense.wi_1",
        ),
        exact=(
            "*.DenseReluDense.wo",  # its inputs are so large that T5 is known to leave the range of float16 here
        ),
    ),
}


def plain_name(layer_name: str) -> str:
    """Returns a layer's name without what its owner's key or its tensor adds: `blocks.0.mlp.point_conv.conv.weight`."""
    name = layer_name.removesuffix(".weight")
    owner = name.removesuffix(".conv")
    return owner if owner.endswith("_conv") else name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns names a layer."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_quantized(network: str, layer_name: str) -> bool:
    """Whether a layer is quantised when nothing else is said.

    Args:
        network: "transformer" or "text_encoder".
        layer_name: of a module or its weight, as `named_modules` and `named_parameters` spell it, for example
            `blocks.0.mlp.inverted_conv.conv` or `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        ValueError: the network is of neither kind.
    """
    return matches(plain_name(layer_name), table_of(network).quantized)


def table_of(network: str) -> LayerTable:
    """Returns the patterns of one kind of network; ValueError where there are none."""
    if network not in LAYERS:
        raise ValueError(f"Networks of the kind {network!r} are not quantised; known: {', '.join(LAYERS)}.")
    return LAYERS[network]
