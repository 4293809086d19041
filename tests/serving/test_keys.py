"""API keys: who gets in, and what a key file holds."""

import pytest

from sana.serving.errors import ApiError
from sana.serving.keys import KeyRing, read_keys


def test_any_of_the_keys_opens():
    ring = KeyRing(["one", "two"])
    assert ring
    ring.check("Bearer one")
    ring.check("bearer  two")


@pytest.mark.parametrize("header", [None, "", "one", "Bearer", "Bearer ", "Bearer on", "Basic one", "Bearer one two",
                                    "Bearer \udcff", "Bearer ONE"])  # fmt: skip
def test_nothing_else_does(header):
    with pytest.raises(ApiError) as caught:
        KeyRing(["one", "two"]).check(header)
    assert (caught.value.status, caught.value.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_without_keys_everybody_may_come_in():
    assert not KeyRing([])
    KeyRing([]).check(None)


def test_a_file_has_one_key_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\n first \nsecond\n")
    assert read_keys(file) == ["first", "second"]
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="no API key"):
        read_keys(file)
