"""Forwards of the transformer for several requests at once, each at its own time. Who asks is in `engine.py`."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sana.models.transformer.caches import TextCache, TextPart, TimeCache, join_times
from sana.serving.coroutine import Outcome
from sana.serving.stepping import Evaluate

KEPT_TEXTS = 4  # joined texts of that many groups are kept: a group meets again at its next step


class BrokenDeviceError(RuntimeError):
    """The accelerator failed in a way that no later call survives: the process has to be started again."""


def attempt(work: Callable[[], Any]) -> Outcome:
    """Runs one request's work; its error is its own.

    Raises:
        BrokenDeviceError: the device failed, which concerns everybody.
    """
    try:
        return Outcome(work())
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise BrokenDeviceError("The accelerator failed; start the server again.") from error
        return Outcome(error=error)


class Evaluator:
    """Answers questions for the transformer.

    On a CPU every question is a call of its own, the very one that the pipeline would make: rows are computed one by
    one there anyway, and so a picture's bits do not depend on its company. Elsewhere questions for the same size are
    one forward.

    Args:
        transformer: of the pipeline.
        join: whether questions are joined; None for wherever that is no CPU.
        max_rows: greatest batch of one forward; guidance takes two rows for a picture, PAG three.

    Attributes:
        forwards: number of calls of the transformer.
    """

    def __init__(self, transformer: nn.Module, *, join: bool | None = None, max_rows: int = 64) -> None:
        self.transformer: Any = transformer
        device = next(transformer.parameters()).device
        self.join = device.type != "cpu" if join is None else join
        self.max_rows = max_rows
        self.forwards = 0
        self._texts: list[tuple[tuple[TextCache, ...], TextPart]] = []

    @torch.inference_mode()
    def answer(self, questions: Sequence[Evaluate]) -> list[Outcome]:
        """Returns the transformer's output, or the error, of each question.

        A group that fails (its memory, say) is tried again one by one, so that an error hits only who caused it.

        Raises:
            BrokenDeviceError: see `attempt`.
        """
        outcomes = [Outcome()] * len(questions)
        for group in self._groups(questions):
            for index, outcome in zip(group, self._group([questions[one] for one in group]), strict=True):
                outcomes[index] = outcome
        return outcomes

    def _group(self, questions: list[Evaluate]) -> list[Outcome]:
        if len(questions) > 1:
            together = attempt(lambda: self._together(questions))
            if together.error is None:
                return [Outcome(one) for one in together.value]
        return [attempt(partial(self._alone, one)) for one in questions]

    def forget(self) -> None:
        """Drops joined texts; for when nobody asks any more."""
        self._texts.clear()

    def _groups(self, questions: Sequence[Evaluate]) -> list[list[int]]:
        """Returns places of questions that are answered together, in the order in which they were asked."""
        open_groups: dict[Hashable, list[int]] = {}
        groups: list[list[int]] = []
        for index, question in enumerate(questions):
            key = joint_key(question) if self.join else None
            group = open_groups.get(key) if key is not None else None
            rows = len(question.latents)
            if group is None or sum(len(questions[one].latents) for one in group) + rows > self.max_rows:
                group = []
                groups.append(group)
                if key is not None:
                    open_groups[key] = group
            group.append(index)
        return groups

    def _alone(self, question: Evaluate) -> Tensor:
        self.forwards += 1
        output: Tensor = self.transformer(*question.args, **question.kwargs)
        return output

    def _together(self, questions: Sequence[Evaluate]) -> list[Tensor]:
        """One forward. Rows are ordered as the transformer wants them: perturbed ones at the end."""
        self.forwards += 1
        order, perturbed = row_order(questions)
        places = torch.tensor(order, device=questions[0].latents.device)
        layers = next((one.kwargs["pag_layers"] for one in questions if one.kwargs.get("pag_rows")), ())
        latents = torch.cat([one.latents for one in questions])[places]
        if isinstance(questions[0].args[2], TextCache):
            text = self._text(questions)
            if order != sorted(order):
                assert text.mask is not None, "joined texts have a mask"
                key_values = tuple((key[places], value[places]) for key, value in text.key_values)
                text = TextPart(text.rows, key_values, text.mask[places])
            kwargs = {"pag_layers": layers, "pag_rows": perturbed} if perturbed else {}
            output = self.transformer(latents, _times(questions, order), TextCache((text,)), **kwargs)
        else:
            output = self._plain(questions, latents, places, layers, perturbed)
        back = torch.empty_like(output)
        back[places] = output
        return list(back.split([len(one.latents) for one in questions]))

    def _plain(
        self, questions: Sequence[Evaluate], latents: Tensor, places: Tensor, layers: tuple[int, ...], perturbed: int
    ) -> Tensor:
        """A forward with texts and times that were not prepared."""
        longest = max(one.args[2].shape[-2] for one in questions)
        times = torch.cat([one.args[1] for one in questions])[places]
        texts = torch.cat([_pad(one.args[2], longest, -2) for one in questions])[places]
        masks = torch.cat([_pad(one.kwargs["mask"], longest, -1) for one in questions])[places]
        info = [one.kwargs.get("data_info") for one in questions]
        kwargs: dict[str, Any] = {"pag_layers": layers, "pag_rows": perturbed} if perturbed else {}
        if info[0]:
            names = info[0]
            kwargs["data_info"] = {name: torch.cat([one[name] for one in info if one])[places] for name in names}
        output: Tensor = self.transformer(latents, times, texts, mask=masks, **kwargs)
        return output

    def _text(self, questions: Sequence[Evaluate]) -> TextPart:
        """Returns the texts of all rows in the order asked; joined once for a group that stays the same."""
        caches = tuple(one.args[2] for one in questions)
        for known, part in self._texts:
            if len(known) == len(caches) and all(a is b for a, b in zip(known, caches, strict=True)):
                return part
        part = join_texts(caches)
        self._texts = [(caches, part), *self._texts[: KEPT_TEXTS - 1]]
        return part


def joint_key(question: Evaluate) -> Hashable | None:
    """Returns what questions of one forward must share; None for one that must stay alone."""
    kwargs, text = question.kwargs, question.args[2]
    if isinstance(text, TextCache) and len(text.parts) != 1:
        return None
    prepared = isinstance(text, TextCache)
    if not prepared and kwargs.get("mask") is None:
        return None
    layers = tuple(kwargs["pag_layers"]) if kwargs.get("pag_rows") else None
    info = tuple(sorted(kwargs.get("data_info") or {}))
    known = {"mask", "data_info", "pag_layers", "pag_rows"}
    if set(kwargs) - known:
        return None
    return tuple(question.latents.shape[1:]), question.latents.dtype, prepared, layers, info


def join_texts(caches: Sequence[TextCache]) -> TextPart:
    """Returns the texts of several batches as those of one: padded to the longest, their masks keeping it unread."""
    parts = [cache.parts[0] for cache in caches]
    longest = max(part.key_values[0][0].shape[2] for part in parts)
    key_values = tuple(
        (
            torch.cat([_pad(part.key_values[depth][0], longest, 2) for part in parts]),
            torch.cat([_pad(part.key_values[depth][1], longest, 2) for part in parts]),
        )
        for depth in range(len(parts[0].key_values))
    )
    masks = []
    for part in parts:
        key = part.key_values[0][0]
        mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        if part.mask is not None:  # a row that may read nothing reads everything: its own tokens, not the padding
            mask = part.mask | ~part.mask.any(dim=1, keepdim=True)
        masks.append(_pad(mask, longest, 1))
    rows = sum(cache.rows for cache in caches)
    return TextPart(tuple(range(rows)), key_values, torch.cat(masks))


def row_order(questions: Sequence[Evaluate]) -> tuple[list[int], int]:
    """Returns where each row of the joint batch comes from, perturbed ones last, and the number of those."""
    plain: list[int] = []
    perturbed: list[int] = []
    first = 0
    for question in questions:
        rows, own = len(question.latents), question.kwargs.get("pag_rows", 0)
        plain += range(first, first + rows - own)
        perturbed += range(first + rows - own, first + rows)
        first += rows
    return [*plain, *perturbed], len(perturbed)


def _times(questions: Sequence[Evaluate], order: Sequence[int]) -> TimeCache:
    """Returns the time of every row."""
    owner = [index for index, one in enumerate(questions) for _ in range(len(one.latents))]
    return join_times([one.args[1] for one in questions], [owner[row] for row in order])


def _pad(tensor: Tensor, length: int, axis: int) -> Tensor:
    missing = length - tensor.shape[axis]
    if not missing:
        return tensor
    after = tensor.dim() - 1 - axis % tensor.dim()
    return functional.pad(tensor, (0, 0) * after + (0, missing))
