"""Downloads of plain http(s) files: resumed after a break, checked for size, put in place in one move.

Files of the Hugging Face hub do not pass here (`sana/utils/hub.py`).
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sana.utils.logging import get_logger

logger = get_logger(__name__)

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without a new byte
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
BROKEN = (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError)


class FetchError(RuntimeError):
    """A file or folder that was asked for could not be had; the message is one sentence for the user."""


@dataclass
class _Remote:
    """What the server said about the file; it decides whether a partial copy may be continued."""

    etag: str | None = None
    last_modified: str | None = None
    size: int | None = None

    @property
    def validator(self) -> str | None:
        """The value for If-Range; a weak etag cannot vouch for bytes."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


def download(url: str, folder: Path, *, offline: bool = False, pause: float = 1.0) -> Path:
    """Returns the local copy of a URL, fetching it when there is none.

    A broken download leaves `<name>.part`; the next call continues it if the server still has the same file.
    A fragment `#sha256=<64 hex digits>` is checked against the content.

    Args:
        url: http or https address.
        folder: where to keep it.
        offline: use a local copy or nothing.
        pause: seconds between attempts.

    Raises:
        FetchError: no connection, an error status, a wrong size or hash, or offline mode without a local copy.
    """
    address, _, fragment = url.partition("#")
    expected = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name or "download"
    target = folder / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if not target.exists() and offline:
        raise FetchError(f"Could not fetch {address}: HF_HUB_OFFLINE is set and there is no local copy {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{name}.lock"):
        if target.exists():
            logger.info("using the local copy %s of %s", target, address)
        else:
            part = target.parent / f"{name}.part"
            _fetch(address, part, pause)
            _check_hash(address, part, expected)
            os.replace(part, target)
            _note(part).unlink(missing_ok=True)
    _check_hash(address, target, expected)
    return target


def _fetch(url: str, part: Path, pause: float) -> None:
    """Repeats requests until `part` is whole; gives up after ATTEMPTS in a row that brought nothing."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _request(url, part):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code not in RETRIED_STATUS:
                raise FetchError(f"Could not fetch {url}: {_explain_status(error.code)}.") from error
            reason = f"the server answered with status {error.code}"
        except BROKEN as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        progressed = part.exists() and part.stat().st_size > before
        failures = 0 if progressed else failures + 1
        if failures >= ATTEMPTS:
            raise FetchError(f"Could not fetch {url}: {reason} ({ATTEMPTS} attempts without a new byte).")
        logger.warning("download of %s broke off (%s); continuing", url, reason)
        time.sleep(pause)


def _request(url: str, part: Path) -> bool:
    """Sends one request, continuing `part` when that is safe.

    Returns:
        True when `part` is whole.
    """
    known = _read_note(part)
    start = part.stat().st_size if part.exists() else 0
    if start and known.size is not None and start == known.size:
        return True
    headers = {"Accept-Encoding": "identity", "User-Agent": "sana-python"}
    if start and known.validator and (known.size is None or start < known.size):
        headers |= {"Range": f"bytes={start}-", "If-Range": known.validator}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        kind = response.headers.get_content_type()
        if kind == "text/html" and not url.endswith((".html", ".htm")):
            raise FetchError(f"Could not fetch {url}: the server sent a web page, not a file.")
        remote = _Remote(response.headers.get("ETag"), response.headers.get("Last-Modified"), _total_size(response))
        resumed = response.status == 206
        if resumed and _range_start(response) != start:
            part.unlink()
            raise ConnectionError("the server sent another range than asked for")
        _note(part).write_text(json.dumps(asdict(remote)))
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return remote.size is None or part.stat().st_size == remote.size


def _total_size(response: Any) -> int | None:
    content_range = re.match(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range") or "")
    if content_range:
        return int(content_range[1])
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdigit() and response.status == 200 else None


def _range_start(response: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(match[1]) if match else None


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_note(part: Path) -> _Remote:
    try:
        return _Remote(**json.loads(_note(part).read_text()))
    except (OSError, ValueError, TypeError):
        return _Remote()  # no usable note: the download starts afresh


def _check_hash(url: str, path: Path, expected: str | None) -> None:
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.unlink()
        raise FetchError(f"{url} has the sha256 {digest.hexdigest()}, not {expected} as asked: the file was removed.")


def _explain_status(code: int) -> str:
    words = {401: "it needs a login", 403: "access is forbidden", 404: "there is no such file", 410: "the file is gone"}
    return f"{words[code]} (status {code})" if code in words else f"the server answered with status {code}"
