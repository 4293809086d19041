"""Questions answered together: which ones, in what order, and what happens when a group fails."""

import pytest
import torch

from sana.models.transformer.caches import TextCache, TextPart
from sana.serving.coroutine import Outcome
from sana.serving.evaluation import BrokenDeviceError, Evaluator, attempt, join_texts, joint_key, row_order
from sana.serving.stepping import Evaluate


def question(rows=2, side=2, perturbed=0, **kwargs):
    """A question without prepared texts; its latents are all its row's number."""
    latents = torch.arange(rows).float().view(rows, 1, 1, 1).expand(rows, 1, side, side)
    pag = {"pag_layers": (0,), "pag_rows": perturbed} if perturbed else {}
    text = torch.ones(rows, 1, 3, 4)
    return Evaluate((latents, torch.zeros(rows), text), {"mask": torch.ones(rows, 3), **pag, **kwargs})


class Model(torch.nn.Linear):
    """Adds the time to the latents; remembers the batches; may refuse large ones or certain latents."""

    def __init__(self, most=100):
        super().__init__(1, 1)
        self.most, self.batches = most, []

    def forward(self, latents, times, text, mask=None, pag_layers=(), pag_rows=0, data_info=None):
        self.batches.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("too large")
        if (latents > 1000).any():
            raise ValueError("bad latents")
        return latents + times.view(-1, 1, 1, 1)


def test_questions_of_one_size_are_one_forward_and_each_gets_its_rows():
    model = Model()
    asked = [question(2), question(1, side=3), question(3), question(3, side=3, perturbed=1)]
    answers = Evaluator(model, join=True).answer(asked)
    assert model.batches == [5, 1, 3]
    for one, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer.unwrap(), one.latents)


def test_perturbed_rows_of_all_questions_come_last_and_go_back():
    asked = [question(3, perturbed=1), question(3, perturbed=1)]
    order, perturbed = row_order(asked)
    assert (order, perturbed) == ([0, 1, 3, 4, 2, 5], 2)
    for one, answer in zip(asked, Evaluator(Model(), join=True).answer(asked), strict=True):
        assert torch.equal(answer.unwrap(), one.latents)


def test_on_a_cpu_every_question_is_a_call_of_its_own():
    model = Model()
    Evaluator(model).answer([question(2), question(2)])
    assert model.batches == [2, 2]


def test_a_group_is_no_larger_than_allowed():
    model = Model()
    Evaluator(model, join=True, max_rows=4).answer([question(2) for _ in range(5)])
    assert model.batches == [4, 4, 2]


def test_a_group_that_fails_is_tried_one_by_one_and_only_the_culprit_fails():
    model = Model(most=3)
    bad = question(1)
    bad = Evaluate((bad.latents + 5000, *bad.args[1:]), bad.kwargs)
    answers = Evaluator(model, join=True).answer([question(2), bad, question(2)])
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert isinstance(answers[1].error, ValueError)


def test_a_broken_device_is_everybodys():
    assert attempt(lambda: 3) == Outcome(3)
    assert isinstance(attempt(lambda: {}["x"]).error, KeyError)

    def breaks():
        raise torch.AcceleratorError("gone")

    with pytest.raises(BrokenDeviceError):
        attempt(breaks)


def test_what_is_unknown_stays_alone():
    assert joint_key(question(control=1)) is None
    assert joint_key(Evaluate((torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1, 1, 3, 4)))) is None
    assert joint_key(question(2)) == joint_key(question(3)) != joint_key(question(3, perturbed=1))


def test_texts_are_padded_with_tokens_that_nobody_reads():
    def cache(rows, length, mask):
        key = torch.randn(rows, 2, length, 3)
        return TextCache((TextPart(tuple(range(rows)), ((key, key + 1),), mask),))

    first, second = cache(1, 2, None), cache(2, 4, torch.tensor([[True, False, True, True], [False] * 4]))
    joined = join_texts([first, second])
    assert joined.rows == (0, 1, 2)
    key, value = joined.key_values[0]
    assert torch.equal(key[0, :, :2], first.parts[0].key_values[0][0][0]) and key.shape == (3, 2, 4, 3)
    assert torch.equal(value[1:], second.parts[0].key_values[0][1])
    # A row that may read nothing reads all of its own tokens, as it does alone.
    assert joined.mask.tolist() == [[True, True, False, False], [True, False, True, True], [True] * 4]
