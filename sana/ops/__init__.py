"""Operators as functions, tensors in and tensors out: what a model calls. Modules and weights are not here."""

from sana.ops.linear_attention.reference import relu_linear_attention
from sana.ops.mix_ffn.reference import mix_ffn
from sana.ops.rms_norm.reference import rms_norm, rms_norm_2d

__all__ = ["mix_ffn", "relu_linear_attention", "rms_norm", "rms_norm_2d"]
