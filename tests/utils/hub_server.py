"""A small hub on loopback: repositories with hashes, ranges and faults, enough for the real huggingface_hub client."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys, time
from sana.utils import hub
time.sleep = lambda seconds: None  # attempts follow one another at once
results = []
for task in json.loads(sys.argv[1]):
    try:
        found = hub.resolve(task.pop("ref"), **task)
        results.append({"path": str(found)})
    except hub.FetchError as error:
        results.append({"error": str(error)})
print(json.dumps(results))
"""


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        repos: "owner/name" -> {path: content}. Files of 64 bytes and more have a sha256 etag as LFS files do.
        gated: repositories that need `token`.
        plain: path -> content of files outside any repository, served under /files/.
        cut: path -> how many bytes to send before the connection breaks, once for every entry of the list.
        promised: path -> an etag to claim instead of the true one.
        no_range: whether the server ignores Range.
        log: every request as (method, path, headers).
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    plain: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    promised: dict[str, str] = field(default_factory=dict)
    no_range: bool = False
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def gets(self, ending: str) -> list[dict[str, str]]:
        """The headers of every GET of a path with this ending."""
        return [headers for method, path, headers in self.log if method == "GET" and path.endswith(ending)]

    def etag(self, path: str, content: bytes) -> str:
        """Sha256 for large files, git's blob hash for small ones."""
        if path in self.promised:
            return self.promised[path]
        if len(content) >= 64:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if path.startswith("files/"):
            self._plain(path.removeprefix("files/"))
            return
        parts = path.split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"no such page")

    def _allowed(self, repo: str) -> bool:
        if repo not in self.hub.repos:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return False
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"})
            return False
        return True

    def _api(self, repo: str, rest: list[str]) -> None:
        if not self._allowed(repo):
            return
        files = self.hub.repos[repo]
        if rest[:1] == ["tree"]:
            entries: list[dict[str, Any]] = []
            for path, content in files.items():
                etag = self.hub.etag(path, content)
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": etag[:40]}
                if len(etag) == 64:
                    entry["lfs"] = {"oid": etag, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._json(entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if not self._allowed(repo):
            return
        if revision not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content = self.hub.repos[repo].get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = self.hub.etag(path, content)
        self._content(path, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _plain(self, path: str) -> None:
        content = self.hub.plain.get(path)
        if content is None:
            self._send(404, b"missing")
            return
        kind = "text/html" if path.endswith(".page") else "application/octet-stream"
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        self._content(path, content, {"ETag": tag, "Content-Type": kind})

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        fresh = self.headers.get("If-Range") in (None, headers["ETag"])
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and fresh and not self.hub.no_range else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cuts = self.hub.cut.get(path, [])
        stop = cuts.pop(0) if self.command == "GET" and cuts else None
        self._send(206 if start else 200, body, headers, stop)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, stop: int | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET":
            return
        self.wfile.write(body if stop is None else body[:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serves a hub on a free port of loopback; `hub.url` is its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def ask(hub: Hub, home: Path, *tasks: dict[str, Any], **environment: str) -> list[dict[str, str]]:
    """Runs `resolve` for every task in a new process, whose huggingface_hub reads the environment given here.

    Returns:
        For every task {"path": ...} or {"error": ...}.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(tasks)],
        env=kept | settings | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip().splitlines()[-1])
