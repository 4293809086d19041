"""The tool: what it writes is what quantising after loading gives; exit codes."""

import pytest
import torch

from sana.models.quantization.apply import quantization_of
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tiny_model import make_model_folder
from tools.quantize import main

CALL = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2, "progress_bar": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_written_folder_has_the_bits_of_quantising_after_loading(folder, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    given = ["--model_path", str(folder), "--scheme", "int8", "--text_encoder", "nf4", "--dtype", dtype]
    assert main([*given, "--keep", "blocks.0.*", "text_encoder.*.down_proj", "--output", str(out)]) == 0
    assert "written" in capsys.readouterr().out
    loaded = SanaPipeline.from_pretrained(out, device="cpu", dtype=dtype)
    after = SanaPipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    after.quantize("int8", "nf4", keep=("blocks.0.*", "text_encoder.*.down_proj"))
    assert torch.equal(loaded(**CALL), after(**CALL)) and loaded.weights_hash() == after.weights_hash()
    assert all(name.startswith("blocks.1.") for name in quantization_of(loaded.transformer).layers)


def test_the_text_encoder_alone(folder, tmp_path):
    assert main(["--model_path", str(folder), "--text_encoder", "int8", "--output", str(tmp_path / "out")]) == 0
    loaded = SanaPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert quantization_of(loaded.transformer) is None and quantization_of(loaded.text_encoder).scheme == "int8"


def test_exit_codes(folder, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["--model_path", str(folder), *out])
    assert main(["--model_path", str(folder), "--scheme", "int4", *out]) == 2
    assert "int4 runs on CUDA devices" in capsys.readouterr().err
    assert main(["--model_path", str(tmp_path / "nothing"), "--scheme", "int8", *out]) == 1
    (tmp_path / "out").mkdir()
    assert main(["--model_path", str(folder), "--scheme", "int8", *out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
