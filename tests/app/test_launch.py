"""Address, port, passwords and signals of the web app, with a page that only remembers how it was shown."""

import importlib
import os
import signal
import socket

import pytest

from app.launch import PORT, Door, address, choose_port, free_port, need_gradio, open_door, read_logins
from sana.utils.hub import FetchError


class Page:
    """Stands for a `gradio.Blocks`."""

    def __init__(self, share_url=None):
        self.share_url, self.shown, self.closed = share_url, None, False

    def launch(self, **how):
        print("* Running on a line that Gradio prints")
        self.shown = how

    def close(self, verbose):
        self.closed = True


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [(None, None, PORT), (None, "", PORT), (None, "7000", 7000), (7001, "7000", 7001), (0, None, 0), (7001, "x", 7001)],
)
def test_the_option_wins_over_the_variable(option, variable, expected):
    assert choose_port(option, variable) == expected


@pytest.mark.parametrize(("option", "variable"), [(None, "http"), (None, "-1"), (65536, None), (-1, "7000")])
def test_a_port_that_is_none_names_where_it_stands(option, variable):
    with pytest.raises(ValueError, match="^DEMO_PORT must be" if option is None else "^port must be"):
        choose_port(option, variable)


def test_a_port_in_use_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"Cannot listen at 127\.0\.0\.1, port {port}: .*--port"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(OSError, match="Cannot listen at no.such.host"):
        free_port("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_the_address_is_one_to_click_on(host, expected):
    assert address(host, 80) == expected


def test_logins(tmp_path):
    file = tmp_path / "people"
    file.write_text("# who may come in\n\nme:a:b c\nyou:\u00fc\n", encoding="utf-8")
    assert read_logins(None, None, str(file)) == (("me", "a:b c"), ("you", "\u00fc"))
    assert read_logins("me", "secret", None) == (("me", "secret"),)
    assert read_logins(None, None, None) == ()


@pytest.mark.parametrize(
    ("user", "password", "lines", "complaint"),
    [
        ("me", None, None, "one of them is missing"),
        (None, "secret", None, "one of them is missing"),
        ("me", "", None, "not be empty"),
        ("me", "secret", "me:secret", "one of both ways"),
        (None, None, "# nobody\n", "holds no login"),
        (None, None, "me:secret\nyou\n", "Line 2 of .*name:password"),
        (None, None, ":secret\n", "Line 1"),
    ],
)
def test_half_a_login_is_an_error(tmp_path, user, password, lines, complaint):
    file = tmp_path / "people"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(ValueError, match=complaint) as wrong:
        read_logins(user, password, None if lines is None else str(file))
    assert "secret" not in str(wrong.value)
    with pytest.raises(OSError):
        read_logins(None, None, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(number, capsys):
    page, said, before = Page(), [], signal.getsignal(number)

    def ready(url):
        assert page.shown is not None and not page.closed
        said.append(url)
        os.kill(os.getpid(), number)

    door = Door(port=7000, logins=(("me", "secret"),))
    assert open_door(page, door, {"css": "x"}, ready) == 0
    assert said == ["http://127.0.0.1:7000"] and page.closed and signal.getsignal(number) is before
    assert capsys.readouterr().out == ""  # what Gradio prints is no result
    how = page.shown
    assert (how["server_name"], how["server_port"], how["share"], how["css"]) == ("127.0.0.1", 7000, False, "x")
    assert how["auth"] == [("me", "secret")]


def test_the_public_link_is_said_too(caplog):
    page, said = Page("https://x.example"), []

    def ready(url):
        said.append(url)
        os.kill(os.getpid(), signal.SIGTERM) if len(said) == 2 else None

    assert open_door(page, Door(port=7000, share=True), {}, ready) == 0
    assert said == ["http://127.0.0.1:7000", "https://x.example"]
    assert page.shown["auth"] is None and "no password" in caplog.text


def test_no_public_link_is_an_error():
    page, said = Page(None), []
    with pytest.raises(FetchError, match="without --share"):
        open_door(page, Door(port=7000, share=True), {}, said.append)
    assert page.closed and not said


def test_without_gradio_the_command_that_installs_it_is_named(monkeypatch):
    need_gradio()

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs gradio: pip install 'sana-python\[gradio\]'"):
        need_gradio()
