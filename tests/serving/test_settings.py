"""Limits of a server."""

import pytest

from sana.serving.settings import ServerSettings


def test_a_server_is_for_this_machine_only_unless_asked():
    assert ServerSettings().host == "127.0.0.1"


def test_pixels_follow_the_model():
    assert ServerSettings().pixels(1024) == 4 * 1024**2
    assert ServerSettings(max_pixels=100).pixels(1024) == 100


@pytest.mark.parametrize(
    ("options", "match"),
    [({"port": -1}, "port"), ({"max_queue": 0}, "max_queue"), ({"grace_seconds": 0.0}, "grace_seconds"),
     ({"max_images": 65}, "max_images"), ({"max_steps": 10_001}, "max_steps"), ({"api_keys": [" "]}, "API key"),
     ({"api_keys": ["a "]}, "API key"), ({"api_keys": ["ä"]}, "API key")],
)  # fmt: skip
def test_what_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        ServerSettings(**options)
