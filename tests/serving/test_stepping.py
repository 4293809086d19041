"""The pipeline that asks: it shares everything, asks for every network, and leaves the true one as it was."""

import pytest
import torch

from sana.pipelines.request import Request
from sana.serving.stepping import Do, Evaluate, SteppedPipeline, stand_in


def answering(pipeline, asked):
    """Returns an `ask` that answers at once and notes what kind of question came."""

    def ask(question):
        asked.append(type(question))
        if isinstance(question, Do):
            return question.function()
        return pipeline.transformer(*question.args, **question.kwargs)

    return ask


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"pag_scale": 2.0}, {"step_cache": 0.2}])
def test_asking_changes_no_bit(small, options):
    request = Request("a cat", num_inference_steps=3, seed=1, negative_prompt="dog", **options)
    asked, before = [], dict(small.__dict__)
    image = SteppedPipeline(small, answering(small, asked)).generate(request)
    assert torch.equal(image, small.generate(request))
    assert asked.count(Evaluate) <= 3 and asked[-1] is Do
    assert all(small.__dict__[name] is value for name, value in before.items() if name != "_weights_hash")


def test_no_network_runs_outside_of_an_answer(small):
    """Every module's forward happens while a question is being answered."""
    inside, outside = [], []

    def watch(module, args):
        if not inside:
            outside.append(type(module).__name__)

    answer = answering(small, [])

    def ask(question):
        inside.append(1)
        try:
            return answer(question)
        finally:
            inside.pop()

    hooks = [
        module.register_forward_pre_hook(watch)
        for network in (small.transformer, small.autoencoder, small.text_encoder)
        for module in network.modules()
    ]
    try:
        SteppedPipeline(small, ask).generate(Request("something new", num_inference_steps=2, seed=1))
    finally:
        for hook in hooks:
            hook.remove()
    assert outside == []


def test_the_stand_in_is_of_the_same_class_and_weights_and_keeps_hooks_to_the_true_one(small):
    seen = []
    hook = small.transformer.register_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        other = stand_in(small, small.transformer, lambda question: "answer")
        assert type(other) is type(small.transformer)
        ours, theirs = dict(other.named_parameters()), dict(small.transformer.named_parameters())
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
        assert other(torch.zeros(1)) == other.cache_text(None) == other.cache_time(None) == "answer"
        assert seen == []
    finally:
        hook.remove()


def test_offload_keeps_managing_the_true_transformer(small):
    """A pipeline under offload takes what is assigned to it; the stand-in must not get there."""
    assigned = []

    class Managed(type(small)):
        def __setattr__(self, name, value):
            assigned.append(name)
            super().__setattr__(name, value)

    managed = Managed.__new__(Managed)
    managed.__dict__.update(small.__dict__)
    SteppedPipeline(managed, lambda question: None)
    assert assigned == [] and managed.transformer is small.transformer
