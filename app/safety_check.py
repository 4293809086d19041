"""Says which prompts are refused: by ShieldGemma, by a short list of words, or not at all. No page is here.

`open_safety_check(options)` returns what the page uses: `check(prompt)` with the text as it is drawn (style and all), a
refusal to show instead of a picture or None, and `notice`, which the page shows at all times. Negative prompts are not
checked: guidance leads away from them, and they name what nobody wants to see.
"""

import re
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from app.options import DemoOptions
from sana.models.checkpoint import CheckpointError
from sana.utils import hub
from sana.utils.logging import get_logger

logger = get_logger(__name__)

THRESHOLD = 0.2  # of the probability of "Yes"; the released app's
MAX_TOKENS = 1024  # of a prompt; the image models read 300
HUB_SECONDS = 5.0  # for the hub to say whether it has a model that nobody asked for by name
FILES = ("*.json", "*.model", "*.safetensors")

# What ShieldGemma was trained to read (its model card, prompt-only classification), one policy at a time.
QUESTION = """You are a policy expert trying to help determine whether a user
prompt is in violation of the defined safety policies.
<start_of_turn>
Human Question: {prompt}
<end_of_turn>

Our safety principle is defined in the below:

* {policy}

Does the human question violate the above principle? Your answer must start
with 'Yes' or 'No'. And then walk through step by step to be sure we answer
correctly.
"""
POLICIES = {
    "dangerous content": '"No Dangerous Content": The prompt shall not contain or seek generation of content that '
    "harming oneself and/or others (e.g., accessing or building firearms and explosive devices, promotion of "
    "terrorism, instructions for suicide).",
    "harassment": '"No Harassment": The prompt shall not contain or seek generation of content that is malicious, '
    "intimidating, bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic "
    "events, disparaging victims of violence).",
    "hate speech": '"No Hate Speech": The prompt shall not contain or seek generation of content that targeting '
    "identity and/or protected attributes (e.g., racial slurs, promotion of discrimination, calls to violence against "
    "protected groups) or dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, "
    "age, nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other protected "
    "status. We do allow content that includes a reference to a protected individual or group in a positive manner.",
    "sexually explicit content": '"No Sexually Explicit Information": The prompt shall not contain or seek generation '
    "of content that contains references to sexual acts or other lewd content (e.g., sexually graphic descriptions, "
    "content aimed at causing arousal). Medical or scientific terms related to human anatomy or sex education are "
    "permitted.",
}
WORDS = (
    "beheading", "bestiality", "child porn", "dismembered", "genitals", "gore", "hentai", "how to make a bomb",
    "lynching", "naked", "nsfw", "nude", "orgy", "pedophile", "porn", "pornographic", "rape", "school shooting",
    "self-harm", "sex act", "suicide", "swastika", "torture", "xxx",
)  # fmt: skip

SHIELD = (
    "Prompts are checked by ShieldGemma, which makes mistakes: it misses harmful prompts and refuses harmless ones. "
    "Pictures are not checked."
)
UNAVAILABLE = "**Prompts are not checked**: ShieldGemma, which would check them, is not available here."
BASIC = "Prompts are only compared with a short list of words, which is easily evaded. **This is no safety check.**"
OFF = "**Prompts are not checked**: the safety check is switched off."


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

    notice: str = OFF

    def check(self, prompt: str) -> str | None:
        """Returns None."""
        return None


@dataclass(frozen=True)
class WordCheck:
    """Refuses prompts that hold one of some words; whoever spells them otherwise is not found out."""

    words: tuple[str, ...] = WORDS
    notice: str = BASIC

    def check(self, prompt: str) -> str | None:
        """Returns a refusal where a word, or its plural, stands in the prompt; case and width do not count."""
        text = plain(prompt).casefold()
        if any(re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", text) for word in self.words):
            return "This prompt holds a word of this page's list; no picture was made."
        return None


class ShieldCheck:
    """ShieldGemma: a language model that is asked of each policy whether a prompt violates it.

    Args:
        model: called with `input_ids` (1, T), returns `logits` (1, T, V).
        tokenizer: its tokenizer; it must know the words "Yes" and "No".
        threshold: a prompt is refused where the probability of "Yes", of the two, is larger.

    Raises:
        CheckpointError: the tokenizer does not know the two words.
    """

    notice = SHIELD

    def __init__(self, model: Any, tokenizer: Any, *, threshold: float = THRESHOLD) -> None:
        self._model, self._tokenizer, self._threshold = model, tokenizer, threshold
        self._answers = [tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No")]
        self._lock = threading.Lock()
        if None in self._answers or tokenizer.unk_token_id in self._answers:
            raise CheckpointError("its tokenizer does not know the words Yes and No, so it is no ShieldGemma")

    def check(self, prompt: str) -> str | None:
        """Returns a refusal that names the policy; so too where a prompt is too long, or the model fails."""
        text = without_marks(prompt)
        length = len(self._tokenizer.encode(text, add_special_tokens=False))
        if length > MAX_TOKENS:
            return f"This prompt is too long to be checked: {length} tokens, and at most {MAX_TOKENS} are read."
        try:
            for name, policy in POLICIES.items():
                if self.probability(text, policy) > self._threshold:
                    return f"The safety check refuses this prompt ({name}); no picture was made."
        except RuntimeError:  # out of memory, say; nothing that was not checked is drawn
            logger.exception("the safety check failed")
            return "The safety check failed; no picture was made."
        return None

    @torch.inference_mode()
    def probability(self, prompt: str, policy: str) -> float:
        """Returns the probability, in [0, 1], that the answer to a policy's question begins with Yes rather than No."""
        ids = self._tokenizer.encode(QUESTION.format(prompt=prompt, policy=policy))
        if ids[-1] == self._tokenizer.eos_token_id:  # some tokenizers end every text; the answer must follow
            ids.pop()
        with self._lock:
            logits = self._model(input_ids=torch.tensor([ids], device=self._model.device)).logits
        yes = logits[0, -1, self._answers].float().softmax(dim=0)[0]
        return float(yes) if torch.isfinite(yes) else 1.0


def plain(text: str) -> str:
    """Returns a text in one line, without invisible characters, and wide or ornate letters as plain ones."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(one for one in text if unicodedata.category(one) not in ("Cf", "Cs")).split())


def without_marks(prompt: str) -> str:
    """Returns a prompt as the question quotes it: no control token (`<end_of_turn>`) and no new line can be in it."""
    return plain(prompt).replace("<", "(").replace(">", ")")


def open_safety_check(options: DemoOptions) -> SafetyCheck:
    """Returns the check that the options name.

    ShieldGemma that nobody asked for by name and that cannot be had is no error: the page then says that nothing is
    checked.

    Args:
        options: see `safety`, `shield_model_path` and `safety_required`.

    Raises:
        FetchError, CheckpointError: ShieldGemma was asked for by name and cannot be had or used.
    """
    if options.safety == "off":
        return NoCheck()
    if options.safety == "basic":
        return WordCheck()
    try:
        return load_shield(options)
    except (hub.FetchError, CheckpointError) as error:
        if options.safety_required:
            raise
        logger.warning("prompts are not checked: %s", error)
        return NoCheck(UNAVAILABLE)


def require_shield(options: DemoOptions) -> None:
    """Checks that ShieldGemma can be had where it was asked for by name; nothing is loaded.

    Raises:
        FetchError: it cannot be had.
    """
    if options.safety_required:
        find_shield(options.shield_model_path, None)


def load_shield(options: DemoOptions) -> ShieldCheck:
    """Loads ShieldGemma from a folder, the hub's cache or the hub.

    Raises:
        FetchError: it cannot be had.
        CheckpointError: it cannot be used.
    """
    path = options.shield_model_path
    folder = find_shield(path, None if options.safety_required else HUB_SECONDS)

    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds, and often there is no folder

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("loading ShieldGemma from %s", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
        )
        return ShieldCheck(model.to(device).eval(), tokenizer)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be used to check prompts: {reason}.") from error


def find_shield(path: str, seconds: float | None) -> Path:
    """Returns the folder of ShieldGemma, fetching it when it is on the hub and may be had.

    A small file is asked for first, so that a gated or missing model is known before gigabytes are fetched.

    Args:
        path: a folder, hub id or hf:// reference.
        seconds: how long to wait for the hub to say whether it has it; None for as long as it takes.

    Raises:
        FetchError: it cannot be had.
    """
    if Path(path).expanduser().exists():
        return hub.resolve(path, kind="folder")
    try:
        within(seconds, lambda: hub.resolve(path, kind="folder", allow_patterns=["config.json"]), path)
    except hub.FetchError as error:
        raise hub.FetchError(
            f"ShieldGemma cannot be had; --safety=basic and --safety=off do without. {error}"
        ) from error
    logger.info("fetching %s, about 5 GB, unless it is in the cache", path)
    return hub.resolve(path, kind="folder", allow_patterns=FILES)


def within(seconds: float | None, work: Callable[[], Path], what: str) -> Path:
    """Returns what some work returns.

    Raises:
        FetchError: it took longer; it is left to itself, in a thread that keeps no process alive.
    """
    if seconds is None:
        return work()
    done: list[Path | Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except hub.FetchError as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise hub.FetchError(f"Could not fetch {what}: the hub did not answer within {seconds:g} seconds.")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]
