"""Who may come in: bearer keys, compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from sana.serving.errors import ApiError


def read_keys(file: str | Path) -> list[str]:
    """Returns the keys of a file: one a line; empty lines and lines that begin with # do not count.

    Raises:
        ValueError: there is none.
        OSError: the file cannot be read.
    """
    lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} holds no API key; write one a line.")
    return keys


class KeyRing:
    """The keys of a server. Only their digests are kept.

    Args:
        keys: none at all means that everybody may come in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Lets the bearer of a key in.

        Args:
            authorization: the header of that name.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them, whichever fits
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "An API key is needed: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
