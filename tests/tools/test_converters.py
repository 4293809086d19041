"""Both converters, judged by diffusers: what we export makes the same picture there; the way back is exact."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sana.diffusion import SAMPLERS
from sana.models.diffusers_config import transformer_config
from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from sana.models.weights import CheckpointError, load_state_dict, load_weights, read_metadata, save_checkpoint
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.models.tiny_folder import tiny_metadata, tiny_state, tiny_transformer, write_tiny_folder
from tests.tools.given_times import GivenAngles, GivenTimes
from tools import convert_diffusers_to_sana, convert_sana_to_diffusers

diffusers = pytest.importorskip("diffusers")

SIZE = {"height": 64, "width": 96, "use_resolution_binning": False}
LIMIT = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`, and `theirs` exported from it in float32 and, as a variant, in bfloat16."""
    root = tmp_path_factory.mktemp("converted")
    ours = write_tiny_folder(root / "ours")
    export = ["--orig_ckpt_path", str(ours), "--dump_path", str(root / "theirs"), "--save_full_pipeline"]
    assert convert_sana_to_diffusers.main(export) == 0
    assert convert_sana_to_diffusers.main([*export, "--dtype", "bf16", "--variant", "bf16"]) == 0
    return root


@pytest.fixture(scope="module")
def ours(folders: Path) -> SanaPipeline:
    return SanaPipeline.from_pretrained(folders / "ours", device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def theirs(folders: Path) -> Iterator[diffusers.SanaPipeline]:
    pipeline = diffusers.SanaPipeline.from_pretrained(folders / "theirs", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def pictures(pipeline: diffusers.SanaPipeline, **arguments: object) -> torch.Tensor:
    """What diffusers makes, in [-1, 1]."""
    return pipeline(output_type="pt", **SIZE, **arguments).images * 2 - 1


def use_given_times(pipeline: diffusers.SanaPipeline, steps: int) -> None:
    scheduler = GivenTimes.from_config(pipeline.scheduler.config)
    scheduler.given = SAMPLERS["flow_dpm-solver"].times(steps, flow_shift=3.0)
    pipeline.scheduler = scheduler


def test_the_same_picture_from_a_prompt(
    ours: SanaPipeline, theirs: diffusers.SanaPipeline, latents: torch.Tensor
) -> None:
    use_given_times(theirs, 8)
    arguments = {"prompt": "a cat", "guidance_scale": 1.0, "num_inference_steps": 8, "latents": latents}
    expected = pictures(
        theirs,
        complex_human_instruction=ours.config.text_encoder.chi_prompt,
        max_sequence_length=ours.config.text_encoder.model_max_length,
        **arguments,
    )
    image = ours(progress_bar=False, **SIZE, **arguments)
    assert image.abs().max() > 0.5
    assert (image.clamp(-1, 1) - expected).abs().max() <= LIMIT


def test_the_same_picture_with_guidance(
    ours: SanaPipeline, theirs: diffusers.SanaPipeline, latents: torch.Tensor
) -> None:
    """With the prompt's mask for both branches, as Sana was trained; diffusers gives the null caption its own."""
    use_given_times(theirs, 8)
    prompt, null = ours.encode_prompts(["a red fox"]), ours.encode_prompts(["blurry"], null=True)
    expected = pictures(
        theirs,
        negative_prompt=None,
        prompt_embeds=prompt.embeds,
        prompt_attention_mask=prompt.mask,
        negative_prompt_embeds=null.embeds,
        negative_prompt_attention_mask=prompt.mask,
        guidance_scale=4.5,
        num_inference_steps=8,
        latents=latents,
    )
    image = ours(
        prompt="a red fox",
        negative_prompt="blurry",
        guidance_scale=4.5,
        num_inference_steps=8,
        latents=latents,
        progress_bar=False,
        **SIZE,
    )
    assert (image.clamp(-1, 1) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("steps", [8, 14, 20])
def test_the_default_grids_agree(theirs: diffusers.SanaPipeline, steps: int) -> None:
    """diffusers' default flow grid is ours, up to rounding; see asset/docs/conversion.md for Euler."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(steps)
    times = SAMPLERS["flow_dpm-solver"].times(steps, flow_shift=3.0)
    assert (scheduler.sigmas - times).abs().max() <= 1e-6
    assert (scheduler.timesteps - times[:-1] * 1000).abs().max() <= 1


def test_the_bf16_variant_loads_in_diffusers_and_in_ours(folders: Path) -> None:
    exported = load_file(folders / "theirs/transformer/diffusion_pytorch_model.bf16.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    loaded = diffusers.SanaPipeline.from_pretrained(folders / "theirs", variant="bf16", torch_dtype=torch.bfloat16)
    for key, tensor in loaded.transformer.state_dict().items():
        if key in exported:
            assert torch.equal(tensor, exported[key]), key
    back = load_state_dict(folders / "theirs", variant="bf16")
    state = {key: value.bfloat16() for key, value in tiny_state().items() if key != "pos_embed"}
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    pipeline = SanaPipeline.from_pretrained(folders / "theirs", variant="bf16", device="cpu", dtype="fp32")
    weight = pipeline.transformer.state_dict()["x_embedder.proj.weight"]
    assert torch.equal(weight, state["x_embedder.proj.weight"].float())


def test_the_pag_pipeline_loads_it(folders: Path, latents: torch.Tensor) -> None:
    pipeline = diffusers.SanaPAGPipeline.from_pretrained(folders / "theirs", pag_applied_layers="transformer_blocks.1")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a cat", "num_inference_steps": 2, "latents": latents, "max_sequence_length": 20}
    assert torch.isfinite(pictures(pipeline, pag_scale=2.0, **arguments)).all()


def test_our_pipeline_makes_the_same_from_the_exported_folder(
    folders: Path, ours: SanaPipeline, latents: torch.Tensor
) -> None:
    exported = SanaPipeline.from_pretrained(folders / "theirs", device="cpu", dtype="fp32")
    arguments = {"prompt": "a cat", "num_inference_steps": 2, "latents": latents, "progress_bar": False, **SIZE}
    assert torch.equal(exported(**arguments), ours(**arguments))


def test_there_and_back_is_exact(folders: Path, tmp_path: Path) -> None:
    back = ["--diffusers_path", str(folders / "theirs"), "--dump_path"]
    assert convert_diffusers_to_sana.main([*back, str(tmp_path / "back"), "--save_full_pipeline"]) == 0
    assert convert_diffusers_to_sana.main([*back, str(tmp_path / "w.pth")]) == 0
    assert convert_diffusers_to_sana.main([*back, str(tmp_path / "w.safetensors")]) == 0
    state = {key: value for key, value in tiny_state().items() if key != "pos_embed"}
    for place in ("back", "w.pth", "w.safetensors"):
        read = load_state_dict(tmp_path / place)
        assert set(read) == set(state)  # the extra file's y_embedding among them
        assert all(torch.equal(read[key], state[key]) for key in state)
    assert read_metadata(tmp_path / "back") == read_metadata(folders / "ours")
    single = read_metadata(tmp_path / "w.safetensors").config  # its parts stay where they are
    assert (tmp_path / single["vae"]["vae_pretrained"]).samefile(folders / "theirs/vae")
    assert (tmp_path / single["text_encoder"]["text_encoder_name"]).samefile(folders / "theirs/text_encoder")
    for part in ("vae", "text_encoder"):
        first, second = (
            load_file(folder / part / "model.safetensors") for folder in (folders / "ours", tmp_path / "back")
        )
        first = {key.removeprefix("model."): value for key, value in first.items()}
        assert set(first) == set(second)
        assert all(torch.equal(first[key].float(), second[key].float()) for key in first)


def test_a_folder_written_by_diffusers_says_what_was_reinitialised(
    theirs: diffusers.SanaPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], latents: torch.Tensor
) -> None:
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path / "foreign", variant="bf16")
    target = tmp_path / "new.safetensors"
    arguments = ["--diffusers_path", str(tmp_path / "foreign"), "--dump_path", str(target), "--variant", "bf16"]
    assert convert_diffusers_to_sana.main(arguments) == 0
    assert "re-initialised y_embedder.y_embedding" in capsys.readouterr().out
    read, state = load_state_dict(target), tiny_state()
    for key in set(state) - {"pos_embed", "y_embedder.y_embedding"}:
        assert torch.equal(read[key], state[key]), key
    assert read["y_embedder.y_embedding"].shape == (300, 32)
    pipeline = SanaPipeline.from_pretrained(tmp_path / "foreign", variant="bf16", device="cpu", dtype="fp32")
    image = pipeline(prompt="a cat", num_inference_steps=1, latents=latents, progress_bar=False, **SIZE)
    assert torch.isfinite(image).all()


def test_a_sprint_model_computes_the_same_in_diffusers(tmp_path: Path) -> None:
    ours = write_tiny_folder(tmp_path / "ours", sprint=True)
    shutil.rmtree(tmp_path / "ours/vae")
    assert convert_sana_to_diffusers.main(["--orig_ckpt_path", str(ours), "--dump_path", str(tmp_path / "theirs")]) == 0
    network = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "theirs/transformer").eval()
    # without SanaMSCM's TrigFlow wrapper, which diffusers has in its pipeline
    model = SanaMS(**tiny_transformer(sprint=True).init_kwargs).eval()
    load_weights(model, tiny_state(sprint=True))
    noise = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 3, 4, generator=noise), torch.randn(2, 20, 32, generator=noise)
    guidance = torch.tensor([4.5, 2.0])
    times = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        expected = network(latents, text, times, guidance=guidance * 0.1, return_dict=False)[0]
        plain = model(latents, times * 1000, text[:, None], data_info={"cfg_scale": guidance})
    assert (plain - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`, a Sprint model, `theirs` converted from it, `back` from that, and `foreign`, which diffusers wrote."""
    root = tmp_path_factory.mktemp("sprint")
    ours = write_tiny_folder(root / "ours", sprint=True)
    export = ["--orig_ckpt_path", str(ours), "--dump_path", str(root / "theirs"), "--save_full_pipeline"]
    assert convert_sana_to_diffusers.main(export) == 0
    back = ["--diffusers_path", str(root / "theirs"), "--dump_path", str(root / "back"), "--save_full_pipeline"]
    assert convert_diffusers_to_sana.main(back) == 0
    diffusers.SanaSprintPipeline.from_pretrained(root / "theirs", torch_dtype=torch.float32).save_pretrained(
        root / "foreign"
    )
    return root


@pytest.mark.parametrize("angles", [(1.5708, 0.0), (1.5708, 1.3, 0.0), (1.55, 1.2, 0.7, 0.2, 0.0)])
def test_a_sprint_folder_makes_the_same_picture_in_diffusers(
    sprint: Path, latents: torch.Tensor, angles: tuple[float, ...]
) -> None:
    theirs = diffusers.SanaSprintPipeline.from_pretrained(sprint / "theirs", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = GivenAngles.from_config(theirs.scheduler.config)
    theirs.scheduler.given = angles
    ours = SanaPipeline.from_pretrained(sprint / "ours", device="cpu", dtype="fp32")
    shared = {"prompt": "a cat", "guidance_scale": 3.5, "num_inference_steps": len(angles) - 1}
    expected = pictures(
        theirs,
        latents=latents,
        generator=torch.Generator().manual_seed(5),
        intermediate_timesteps=1.3 if len(angles) == 3 else None,
        complex_human_instruction=ours.config.text_encoder.chi_prompt,
        max_sequence_length=ours.config.text_encoder.model_max_length,
        **shared,
    )
    arguments = shared | {"latents": latents * ours.config.scheduler.sigma_data, "timesteps": angles}
    image = ours(generator=torch.Generator().manual_seed(5), progress_bar=False, **SIZE, **arguments)
    assert image.abs().max() > 0.5
    assert (image.clamp(-1, 1) - expected).abs().max() <= LIMIT


def test_a_sprint_folder_loads_in_ours_wherever_it_comes_from(sprint: Path, latents: torch.Tensor) -> None:
    images = []
    for place in ("ours", "theirs", "back", "foreign"):
        pipeline = SanaPipeline.from_pretrained(sprint / place, device="cpu", dtype="fp32")
        assert isinstance(pipeline.transformer, SanaMSCM)
        assert (pipeline.config.scheduler.vis_sampler, pipeline.config.scheduler.sigma_data) == ("scm", 0.5)
        generator = torch.Generator().manual_seed(5)
        images.append(pipeline("a cat", latents=latents, generator=generator, progress_bar=False, **SIZE))
    assert all(torch.equal(image, images[0]) for image in images[1:])
    state = {key: value for key, value in tiny_state(sprint=True).items() if key != "pos_embed"}
    back = load_state_dict(sprint / "back")
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)
    assert read_metadata(sprint / "back") == read_metadata(sprint / "ours")


def test_the_converter_names_the_pipeline_that_loads_its_folder(
    sprint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sprint / "theirs/model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("SanaSprintPipeline", ["diffusers", "SCMScheduler"])
    arguments = [
        "--orig_ckpt_path",
        str(sprint / "ours"),
        "--dump_path",
        str(tmp_path / "again"),
        "--save_full_pipeline",
    ]
    assert convert_sana_to_diffusers.main(arguments) == 0
    assert "it loads with diffusers.SanaSprintPipeline.from_pretrained" in capsys.readouterr().out
    assert convert_sana_to_diffusers.main([*arguments, "--scheduler_type", "flow-euler"]) == 1
    assert "does not fit SanaMSCM" in capsys.readouterr().err


def test_the_data_scale_of_a_sprint_model_travels(tmp_path: Path) -> None:
    from sana.models.diffusers_folder import read_folder_metadata, write_scheduler

    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    kwargs = tiny_metadata(sprint=True).arch["kwargs"]
    config = transformer_config(kwargs, tiny_state(sprint=True))
    (weights.parent / "config.json").write_text(json.dumps(config))
    assert write_scheduler(tmp_path / "scheduler", "scm", 1.0, 0.25) == "SCMScheduler"
    assert read_folder_metadata(tmp_path, weights).config["scheduler"]["sigma_data"] == 0.25
    with pytest.raises(CheckpointError, match="timestep_norm_scale_factor 1000; this model has 1"):
        transformer_config({**kwargs, "timestep_norm_scale_factor": 1.0}, tiny_state(sprint=True))


def test_a_controlnet_is_refused_both_ways(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = tiny_metadata()
    metadata.arch["class"] = "SanaMSControlNet"
    save_checkpoint(tmp_path / "control.safetensors", tiny_state(), metadata)
    export = ["--orig_ckpt_path", str(tmp_path / "control.safetensors"), "--dump_path", str(tmp_path / "out")]
    assert convert_sana_to_diffusers.main(export) == 1
    assert "A ControlNet is not converted. diffusers' ControlNet computes something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    shutil.copytree(folders / "theirs", tmp_path / "theirs")
    index = tmp_path / "theirs/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"controlnet": ["diffusers", "SanaControlNetModel"]}))
    back = ["--diffusers_path", str(tmp_path / "theirs"), "--dump_path", str(tmp_path / "back.safetensors")]
    assert convert_diffusers_to_sana.main(back) == 1
    assert "holds a ControlNet of diffusers" in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds a ControlNet of diffusers"):
        SanaPipeline.from_pretrained(tmp_path / "theirs", device="cpu")


# The command line


def test_the_official_flags_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug B11: the official converter accepts this model type and then rejects it."""
    official = ["--model_type", "SanaMS1.5_4800M_P1_D60", "--image_size", "1024", "--scheduler_type", "flow-dpm_solver"]
    torch.save({"state_dict": tiny_state()}, tmp_path / "tiny.pth")
    rest = ["--orig_ckpt_path", str(tmp_path / "tiny.pth"), "--dump_path", str(tmp_path / "out"), "--dtype", "fp16"]
    assert convert_sana_to_diffusers.main([*official, *rest, "--save_full_pipeline"]) == 1
    error = capsys.readouterr().err
    assert "The weights are of another model: x_embedder.proj.weight is (32, 4, 1, 1) in the file" in error
    assert not (tmp_path / "out").exists()  # nothing half-written


def test_an_official_file_with_its_config_converts_to_the_same(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_metadata().config))  # JSON is YAML
    torch.save({"state_dict": tiny_state()}, tmp_path / "tiny.pth")
    arguments = ["--orig_ckpt_path", str(tmp_path / "tiny.pth"), "--config", str(tmp_path / "tiny.yaml")]
    assert convert_sana_to_diffusers.main([*arguments, "--dump_path", str(tmp_path / "out")]) == 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        expected = (folders / "theirs/transformer" / name).read_bytes()
        assert (tmp_path / "out/transformer" / name).read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transformer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dump_path", "x", "--model_type", "Sana"], "invalid choice: 'Sana'"),
        (["--dump_path", "x", "--image_size", "1000"], "invalid choice: 1000"),
        (["--orig_ckpt_path", "x"], "required: --dump_path"),
        (["--dump_path", "x", "--config", "c.yaml", "--image_size", "512"], "--config says the architecture"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert_sana_to_diffusers.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_failures_exit_with_1_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    export = ["--dump_path", str(tmp_path / "out"), "--orig_ckpt_path"]
    for reference, message in (
        (str(tmp_path / "cut.pth"), "is damaged or cut short"),
        (str(tmp_path / "empty"), "is no model folder"),
        (str(tmp_path / "absent.pth"), "does not exist"),
        ("hf://owner/model/w.pth", "HF_HUB_OFFLINE is set"),
    ):
        assert convert_sana_to_diffusers.main([*export, reference]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()[-1]) == len(error.strip().split("\n")[-1])
    for reference in (str(tmp_path / "empty"), "owner/model"):
        arguments = ["--diffusers_path", reference, "--dump_path", str(tmp_path / "w.pth")]
        assert convert_diffusers_to_sana.main(arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pth", "empty"]


def test_a_missing_checkpoint_means_the_released_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--dump_path", str(tmp_path / "out"), "--model_type", "SanaMS_1600M_P1_D20", "--image_size", "4096"]
    assert convert_sana_to_diffusers.main(model) == 1
    assert (
        "hf://Efficient-Large-Model/Sana_1600M_4Kpx_BF16/checkpoints/Sana_1600M_4Kpx_BF16.pth"
        in capsys.readouterr().err
    )
    assert convert_sana_to_diffusers.main([*model[:2], "--model_type", "SanaMS1.5_3200M_P1_D40"]) == 1
    assert "No released checkpoint is known" in capsys.readouterr().err


def test_the_index_comes_last(folders: Path) -> None:
    index = json.loads((folders / "theirs/model_index.json").read_text())
    assert index["_class_name"] == "SanaPipeline"
    newest = max((folders / "theirs").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "model_index.json"
