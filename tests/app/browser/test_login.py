"""A page with a password, and the end of an app that is at work, in headless Chromium."""

import json
import signal
import urllib.error
import urllib.request

import pytest

from tests.app.browser.conftest import Visitor
from tests.app.conftest import WAIT, AppProcess

pytestmark = pytest.mark.slow


def log_in(page, name, word):
    page.get_by_label("username").fill(name)
    page.get_by_label("password").fill(word)
    page.get_by_role("button", name="Login").click()


def test_a_password_lets_in_and_sigint_ends_the_work(browser, small_folder, tmp_path):
    people = tmp_path / "people"
    people.write_text("# who may come in\nme:a secret\n")
    app = AppProcess(f"--model_path={small_folder}", "--device=cpu", "--safety=off", f"--password_file={people}")
    try:
        visitor = Visitor(browser, app.url)
        page = visitor.page
        log_in(page, "me", "a guess")
        page.get_by_text("Incorrect").wait_for()
        assert page.locator("#prompt").count() == 0
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{app.url}/config", timeout=WAIT)
        assert refused.value.code == 401 and "prompt" not in json.dumps(str(refused.value.read()))

        log_in(page, "me", "a secret")
        assert "switched off" in visitor.text("safety-notice")
        visitor.ask("a red heart", steps=2)
        assert visitor.until_made()[0].shape == (64, 64, 3)

        visitor.ask("a red heart", steps=100, number=8)
        visitor.until("status", "tep 2")
        code = app.end(signal.SIGINT)
        visitor.close()
    finally:
        app.end(signal.SIGKILL)
    assert code == 0 and "Traceback" not in app.log, app.log
