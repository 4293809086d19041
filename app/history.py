"""The last prompts of a browser, which keeps them itself. What comes back from it is checked; nothing is stored."""

from collections.abc import Sequence

from app.wishes import MAX_PROMPT

KEPT = 20
SHOWN = 80  # characters of a prompt


def clean(stored: object) -> list[str]:
    """Returns the prompts that a browser sent back, newest first, without what is none."""
    texts = stored if isinstance(stored, list) else []
    good = (text.strip() for text in texts[: 2 * KEPT] if isinstance(text, str) and len(text) <= MAX_PROMPT)
    return list(dict.fromkeys(text for text in good if text))[:KEPT]


def add(stored: object, prompt: str) -> list[str]:
    """Returns the prompts with one more in front; a prompt that is there already moves to the front."""
    return clean([prompt, *clean(stored)])


def labels(prompts: Sequence[str]) -> list[str]:
    """Returns what the page shows of each prompt: one line, cut where it is long."""
    lines = (" ".join(prompt.split()) for prompt in prompts)
    return [line if len(line) <= SHOWN else f"{line[: SHOWN - 1].rstrip()}…" for line in lines]
