"""The approximations of a request: exact when off, the steps and tokens they promise when on, and their refusals."""

import pytest
import torch

from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance
from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines.approximations import first_tokens, plan_evaluations
from sana.pipelines.denoise import TransformerDenoiser
from sana.pipelines.request import Request

SHORT = {"num_inference_steps": 8, "progress_bar": False, "output_type": "latent", "seed": 3}
LOOSE = 2.0  # the random weights of the tiny model change their embedding much more than trained ones
PROMPTS = ["a cat", "portrait of an old fisherman by the sea, oil painting"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The branches of every evaluation of the transformer."""
    seen: list[tuple[str, ...]] = []
    evaluate = TransformerDenoiser.__call__

    def counted(self, latents, sigma, branches):
        seen.append(branches)
        return evaluate(self, latents, sigma, branches)

    monkeypatch.setattr(TransformerDenoiser, "__call__", counted)
    return seen


def plan(pipeline, threshold, **guidance):
    sampler = SAMPLERS[pipeline.config.scheduler.vis_sampler]
    times = sampler.times(SHORT["num_inference_steps"], flow_shift=pipeline.config.scheduler.flow_shift)
    options = {"transformer": pipeline.transformer, "sampler": sampler, "guidance": Guidance(**guidance)}
    return plan_evaluations(threshold, times=times, **options)


def test_off_is_exact_to_the_bit(pipeline, calls):
    plain = pipeline(PROMPTS, **SHORT)
    off = pipeline(PROMPTS, step_cache=0.0, max_text_tokens=None, **SHORT)
    assert torch.equal(off, plain)
    assert len(calls) == 16


def test_skipped_steps_are_the_planned_ones(pipeline, calls):
    evaluated = plan(pipeline, LOOSE)
    assert 2 <= sum(evaluated) < 8
    approximate = pipeline(PROMPTS, step_cache=LOOSE, **SHORT)
    assert len(calls) == sum(evaluated)
    assert torch.isfinite(approximate).all()


def test_nothing_is_kept_between_calls(pipeline):
    first = pipeline(PROMPTS[0], step_cache=LOOSE, **SHORT)
    pipeline(PROMPTS[1], step_cache=LOOSE / 2, **SHORT)
    assert torch.equal(pipeline(PROMPTS[0], step_cache=LOOSE, **SHORT), first)
    assert not torch.equal(pipeline(PROMPTS[0], **SHORT), first)


def test_a_picture_with_a_step_cache_does_not_depend_on_its_batch(pipeline):
    together = pipeline(PROMPTS, step_cache=LOOSE, **SHORT)
    alone = pipeline(PROMPTS[0], step_cache=LOOSE, **SHORT)
    assert torch.equal(together[:1], alone)


def test_a_prediction_does_not_cross_the_ends_of_the_guidance_interval(pipeline, calls):
    pipeline(PROMPTS[0], step_cache=100.0, interval_guidance=(0.6, 0.9), **SHORT)
    assert calls[0] == ("cond",)
    assert ("uncond", "cond") in calls and calls[-1] == ("cond",)
    assert len(calls) == sum(plan(pipeline, 100.0, interval=(0.6, 0.9))) >= 4


def test_a_sampler_with_times_of_its_own_is_refused(pipeline):
    sampler = SAMPLERS["sa-solver"]
    with pytest.raises(ValueError, match="step_cache works with samplers that ask for velocities"):
        plan_evaluations(
            0.1, transformer=pipeline.transformer, sampler=sampler, times=sampler.times(4), guidance=Guidance()
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step_cache": -0.1}, "step_cache must be a finite number from 0 to 100"),
        ({"step_cache": float("nan")}, "step_cache must be a finite number"),
        ({"max_text_tokens": 0}, "max_text_tokens must be a whole number from 1"),
        ({"max_text_tokens": 3.5}, "max_text_tokens must be a whole number from 1"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ValueError, match=words):
        Request(prompt="a cat", **options)


def test_a_sprint_model_has_no_step_to_spare():
    with pytest.raises(ValueError, match="step_cache cannot take effect with a Sprint model"):
        Request(prompt="a cat", step_cache=0.1).check_for_sprint()
    Request(prompt="a cat", max_text_tokens=8).check_for_sprint()


def embeds(mask: list[list[int]]) -> PromptEmbeds:
    table = torch.tensor(mask)
    return PromptEmbeds(torch.arange(table.numel()).float().reshape(*table.shape, 1), table)


def test_first_tokens_by_hand():
    prompt = embeds([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]])
    cut = first_tokens(prompt, 2)
    assert cut.mask.tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert torch.equal(cut.embeds, prompt.embeds[:, :3])
    assert cut.mask.dtype == prompt.mask.dtype


def test_a_limit_that_no_prompt_reaches_cuts_padding_only():
    prompt = embeds([[1, 1, 1, 0], [1, 1, 0, 0]])
    cut = first_tokens(prompt, 3)
    assert cut.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first_tokens(prompt, None) is prompt


def test_a_mask_without_readable_tokens_is_left_alone():
    prompt = embeds([[0, 0, 0]])
    assert first_tokens(prompt, 1) is prompt


def test_the_transformer_reads_the_first_tokens_only(pipeline):
    """The embeddings after the limit, of prompt and negative prompt, may be anything."""
    encoded = pipeline.encode_prompts([PROMPTS[1]])
    assert encoded.mask.sum() > 6
    changed = encoded.embeds.clone()
    changed[:, 5:] = 7.0
    runs = [
        pipeline(prompt_embeds=rows, prompt_attention_mask=encoded.mask, max_text_tokens=5, **SHORT)
        for rows in (encoded.embeds, changed)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(pipeline(PROMPTS[1], max_text_tokens=5, **SHORT), runs[0])
    assert not torch.equal(pipeline(PROMPTS[1], **SHORT), runs[0])


def test_a_short_prompt_loses_nothing(pipeline):
    count = int(pipeline.encode_prompts([PROMPTS[0]]).mask.sum())
    plain = pipeline(PROMPTS[0], **SHORT)
    assert torch.equal(pipeline(PROMPTS[0], max_text_tokens=count, **SHORT), plain)
    assert not torch.equal(pipeline(PROMPTS[0], max_text_tokens=count - 1, **SHORT), plain)
