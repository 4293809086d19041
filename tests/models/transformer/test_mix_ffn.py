"""The feed-forward modules: keys, grids, activations."""

import torch
import torch.nn.functional as F

from sana.models.transformer.mix_ffn import DepthwiseMlp, MixFFN, PreGluMBConv


def test_keys_are_official() -> None:
    gated = {f"{layer}.conv.{leaf}" for layer in ("inverted_conv", "depth_conv") for leaf in ("weight", "bias")}
    for module in (MixFFN(4, 6), PreGluMBConv(4, 6)):
        assert set(module.state_dict()) == gated | {"point_conv.conv.weight"}
    assert {key.split(".")[0] for key in DepthwiseMlp(4, 6).state_dict()} == {"fc1", "conv", "fc2"}


def test_tokens_meet_their_neighbours_in_the_given_grid() -> None:
    """A change of one token reaches the tokens within the 3x3 kernel of the grid, and no others."""
    for module in (MixFFN(4, 6), PreGluMBConv(4, 6), DepthwiseMlp(4, 6)):
        x = torch.randn(1, 15, 4)
        changed = x.clone()
        changed[0, 5] += 1.0  # row 1, column 0 of a 3 x 5 grid
        moved = (module(x, (3, 5)) - module(changed, (3, 5))).abs().amax(-1)[0] > 1e-7
        assert moved.nonzero().flatten().tolist() == [0, 1, 5, 6, 10, 11]


def test_the_gate_comes_before_the_depthwise_convolution_in_preglu() -> None:
    module = PreGluMBConv(4, 6, acts=("gelu", "relu", None))
    x = torch.randn(2, 6, 4)
    image = x.transpose(1, 2).reshape(2, 4, 2, 3)
    value, gate = module.inverted_conv(image).chunk(2, dim=1)
    hidden = F.relu(module.depth_conv(value * F.gelu(gate, approximate="tanh")))
    torch.testing.assert_close(module(x, (2, 3)), module.point_conv(hidden).flatten(2).transpose(1, 2))


def test_output_activation_and_width() -> None:
    module = MixFFN(4, 6, out_dim=3, acts=("silu", "silu", "relu"), use_bias=(False, True, True))
    out = module(torch.randn(2, 6, 4), (2, 3))
    assert out.shape == (2, 6, 3) and out.min() == 0
