"""What a client may ask for: every field, its limits, and that nothing of what it wrote comes back."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana.serving.errors import ApiError
from sana.serving.settings import ServerSettings
from sana.serving.wishes import DRAWN_SEEDS, Wish, parse_body, parse_size, parse_wish

LIMITS = ServerSettings(max_images=4, max_steps=20, max_prompt=50)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def parse(**content) -> Wish:
    return parse_wish({"prompt": "a cat", **content}, LIMITS, "model", 256)


def failing(**content) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**content)
    return caught.value


def test_all_fields_arrive():
    wish = parse(n=2, size="512x256", seed=9, steps=5, guidance=3, pag=2.0, negative_prompt="dogs", stream=True,
                 partial_images=2, model="model", user="u", quality="auto", output_format="png")  # fmt: skip
    assert wish == Wish("a cat", 2, 256, 512, 9, 5, 3.0, 2.0, "dogs", "b64_json", True, 2)
    first, second = wish.requests()
    assert (first.seed, second.seed, first.num_inference_steps, first.guidance_scale) == (9, 10, 5, 3.0)
    assert (first.height, first.width, first.pag, first.negative_prompt) == (256, 512, 2.0, "dogs")


def test_defaults_and_null_are_the_same():
    given = parse(seed=1, n=None, size=None, steps=None, guidance=None, stream=None, response_format=None)
    assert given == parse(seed=1) == Wish("a cat", 1, None, None, 1)
    assert given.requests()[0].guidance_scale == 4.5


def test_a_seed_is_drawn_when_none_is_given():
    drawn = {parse().seed for _ in range(20)}
    assert len(drawn) > 15 and all(0 <= seed < DRAWN_SEEDS for seed in drawn)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": " "}, "prompt"), ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 51}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"n": 0}, "n"), ({"n": 5}, "n"),
        ({"n": True}, "n"), ({"n": 1.5}, "n"), ({"n": "2"}, "n"), ({"n": 10**400}, "n"), ({"size": 256}, "size"),
        ({"size": "256"}, "size"), ({"size": "1x2x3"}, "size"), ({"size": "-1x256"}, "size"), ({"size": "²x8"}, "size"),
        ({"size": "9999999x1"}, "size"), ({"size": "0x0"}, "size"), ({"size": "1024x255"}, "size"),
        ({"size": "100000x100000"}, "size"), ({"seed": -1}, "seed"), ({"seed": 2**53 + 1}, "seed"),
        ({"steps": 0}, "steps"), ({"steps": 21}, "steps"), ({"guidance": -1}, "guidance"), ({"pag": 0.5}, "pag"),
        ({"guidance": "4"}, "guidance"), ({"guidance": 10**400}, "guidance"), ({"stream": 1}, "stream"),
        ({"response_format": "png"}, "response_format"),
        ({"stream": True, "response_format": "url"}, "response_format"),

        ({"partial_images": 1}, "partial_images"), ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"style": "vivid"}, "style"), ({"quality": "hd"}, "quality"), ({"output_format": "webp"}, "output_format"),
        ({"output_compression": True}, "output_compression"), ({"background": ["auto"]}, "background"),
        ({"user": 3}, "user"), ({"negative_prompt": 5}, "negative_prompt"), ({"not a name": 1}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_names_its_field(content, param):
    error = failing(**content)
    assert (error.status, error.param) == (400, param)


def test_another_model_is_not_found():
    error = failing(model="dall-e-3")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "dall-e-3" not in error.message


def test_sizes_are_width_times_height():
    assert parse_size("auto", LIMITS, 256) == (None, None)
    assert parse_size("512x128", LIMITS, 256) == (128, 512)
    assert parse_size("512x512", LIMITS, 256) == (512, 512)
    with pytest.raises(ApiError):
        parse_size("513x512", LIMITS, 256)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_body_is_an_object_or_a_400(body):
    try:
        assert isinstance(parse_body(body), dict)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"n": NaN}', b'{"n": ' + b"9" * 5000 + b"}", b"", b"\xff\xfe"])
def test_bodies_that_break_parsers_are_no_json(body):
    with pytest.raises(ApiError) as caught:
        parse_body(body)
    assert caught.value.code == "invalid_json"


@given(st.dictionaries(st.sampled_from(["prompt", "n", "size", "seed", "steps", "guidance", "pag", "stream"]), JSON))
def test_any_json_is_a_wish_within_the_limits_or_an_error(content):
    try:
        wish = parse_wish(content, LIMITS, "model", 256)
    except ApiError as error:
        assert error.status == 400 and error.param in content | {"prompt": 0}
        return
    assert 1 <= wish.n <= 4 and (wish.steps is None or wish.steps <= 20) and len(wish.prompt) <= 50
    assert wish.guidance is None or math.isfinite(wish.guidance)
    assert len(wish.requests()) == wish.n
