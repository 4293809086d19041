"""Prompts that the page offers to begin with. Nothing is drawn here."""

BUNDLED_MODEL = "SanaMS_Tiny_P1"
BUNDLED = (
    "a red heart",
    "a frog and a lemon on a blue background",
    "three penguins on a white background",
    "a purple triangle to the right of an orange circle",
    "a big rocket on a gray background",
    "two cats on a blue background",
)
OFFICIAL = (
    'a cyberpunk cat with a neon sign that says "Sana"',
    "a lighthouse on a cliff at dawn, long exposure, waves like silk",
    "a watercolour map of an island shaped like a sleeping fox",
    "a tiny glass greenhouse on a desk, ferns pressing against the panes, morning light",
    "portrait of an old clockmaker surrounded by brass gears, warm lamp light",
    "an isometric cutaway of a bakery on a rainy evening",
)


def examples(model: str) -> tuple[str, ...]:
    """Returns prompts that a model can draw.

    Args:
        model: its registry name. The bundled one knows coloured shapes and emoji only.
    """
    return BUNDLED if model == BUNDLED_MODEL else OFFICIAL
