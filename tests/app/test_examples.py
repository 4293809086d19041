"""Examples: those of the bundled model are in its language."""

from app.examples import examples
from sana.data.sprites import BACKGROUNDS, COLOURS, NOUNS
from sana.pipelines.sana_pipeline import SanaPipeline


def test_the_bundled_model_gets_prompts_that_it_can_draw(bundled: SanaPipeline) -> None:
    words = {*COLOURS, *NOUNS, *(f"{noun}s" for noun in NOUNS)}
    words |= {"a", "an", "and", "two", "three", "on", "to", "the", "right", "of", "big", "background", *BACKGROUNDS}
    for prompt in examples(bundled.config.model.model):
        assert set(prompt.split()) <= words, prompt


def test_other_models_get_others() -> None:
    assert not set(examples("SanaMS_1600M_P1_D20")) & set(examples("SanaMS_Tiny_P1"))
