"""Makes sure that Triton kernels run without a GPU: the interpreter must be on before anything imports Triton."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:  # its own library was then decorated for a GPU, and kernels fail far from the cause
        raise pytest.UsageError(
            "Triton was imported before tests/ops/conftest.py: set TRITON_INTERPRET=1 and start again."
        )
    os.environ["TRITON_INTERPRET"] = "1"
