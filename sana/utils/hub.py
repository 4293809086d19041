"""References (local path, hf://owner/repo/path, hub id, http(s) URL) to local files and folders; loads into no model.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE act as everywhere: huggingface_hub reads them, this file does not.
Plain http(s) files are fetched by `sana/utils/download.py`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sana.utils.download import FetchError, download
from sana.utils.logging import get_logger

__all__ = ["FetchError", "HubReference", "parse_hub_reference", "resolve", "select_variant"]

logger = get_logger(__name__)

HF_SCHEME = "hf://"
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json", ".yaml", ".yml", ".txt", ".model")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"^{_NAME}/{_NAME}(@[\w./-]+)?$")
_VARIANT = re.compile(r"^(?P<stem>[^.]+)\.(?P<variant>[A-Za-z0-9_]+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)$")
_VARIANT_INDEX = re.compile(r"^(?P<stem>[^.]+)\.(safetensors|bin)\.index\.(?P<variant>[A-Za-z0-9_]+)\.json$")


@dataclass(frozen=True)
class HubReference:
    """A place on the hub: repository, path inside it ("" for the whole repository) and revision."""

    repo_id: str
    path: str = ""
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the path names a file (by its suffix)."""
        return self.path.endswith(FILE_SUFFIXES)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{HF_SCHEME}{self.repo_id}{at}" + (f"/{self.path}" if self.path else "")


def parse_hub_reference(ref: str) -> HubReference | None:
    """Reads `hf://owner/repo[@revision][/path]`, `owner/repo[@revision]`, or a file link of the configured hub.

    Returns:
        None when `ref` has none of these forms.

    Raises:
        FetchError: `ref` begins with hf:// but names no repository.
    """
    text = ref.strip()
    if text.startswith(("http://", "https://")):
        return _parse_hub_link(text)
    if not text.startswith(HF_SCHEME):
        if not _HUB_ID.match(text):
            return None
        repo_id, _, revision = text.partition("@")
        return HubReference(repo_id, "", revision or None)
    parts = text.removeprefix(HF_SCHEME).strip("/").split("/")
    if len(parts) < 2 or not all(parts) or ".." in parts:
        raise FetchError(f"{ref!r} is no hub reference: expected hf://owner/repository or hf://owner/repository/path.")
    name, _, revision = parts[1].partition("@")
    return HubReference(f"{parts[0]}/{name}", "/".join(parts[2:]), revision or None)


def resolve(
    ref: str | Path,
    *,
    kind: str = "file",
    variant: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Returns the local path of a file or folder, fetching it first when it is remote.

    Args:
        ref: local path (~ is expanded), hf://owner/repo[@revision][/path], hub id owner/repo (folders), http(s) URL.
        kind: "file", "folder", or "any" (decided by what exists locally, else by the suffix of the path).
        variant: for a folder of the hub, the weight variant wanted ("bf16", "fp16"); weights of other variants are not
            fetched. None fetches the default files, and a variant where a folder has no default.
        allow_patterns: for a folder of the hub, fetch only what matches (replaces the choice by variant).

    Raises:
        FetchError: nothing is there, or it could not be fetched; one sentence that says what and why.
        ValueError: unknown `kind`.
    """
    if kind not in ("file", "folder", "any"):
        raise ValueError(f"kind must be 'file', 'folder' or 'any', not {kind!r}.")
    text = str(ref).strip()
    if not text:
        raise FetchError("An empty reference was given where a file, folder, hub id or URL is needed.")
    is_url = text.startswith(("http://", "https://"))
    if not is_url and not text.startswith(HF_SCHEME):
        local = Path(text).expanduser()
        if local.exists():
            return _checked_local(local, kind)
    hub = parse_hub_reference(text)
    if hub is not None and not (kind == "file" and not hub.path):
        want_file = hub.is_file if kind == "any" else kind == "file"
        return _fetch_file(hub) if want_file else _fetch_folder(hub, variant, allow_patterns)
    if is_url and kind != "folder":
        return _download(text)
    raise FetchError(_explain_unresolved(text, kind, is_url))


def select_variant(files: Sequence[str], variant: str | None = None) -> list[str]:
    """Leaves out weight files of other variants, folder by folder, as diffusers chooses them.

    A folder that lacks the wanted variant keeps its default files; one that lacks default files keeps its variants.

    Args:
        files: paths inside a repository, with "/".
        variant: "bf16", "fp16", ... or None for the default files.

    Returns:
        The chosen paths, in the given order.
    """
    available: dict[str, set[str | None]] = {}
    for file in files:
        folder, name = _split(file)
        if name.endswith(WEIGHT_SUFFIXES) or _VARIANT_INDEX.match(name):
            available.setdefault(folder, set()).add(variant_of(name))
    chosen = []
    for file in files:
        folder, name = _split(file)
        if not (name.endswith(WEIGHT_SUFFIXES) or _VARIANT_INDEX.match(name)):
            chosen.append(file)
            continue
        known = available[folder]
        wanted = variant if variant in known else None
        if wanted in known and variant_of(name) != wanted:
            continue
        chosen.append(file)
    return chosen


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name: "bf16" of "model.bf16.safetensors", None of "model.safetensors"."""
    match = _VARIANT_INDEX.match(name) or _VARIANT.match(name)
    return match["variant"] if match else None


def only_variant(folder: Path) -> str | None:
    """The variant to load from a local folder without default weights; None when it has default weights, or none."""
    names = (file.name for file in folder.iterdir())
    variants = {variant_of(name) for name in names if name.endswith(WEIGHT_SUFFIXES) or _VARIANT_INDEX.match(name)}
    named = sorted(variant for variant in variants if variant is not None)
    return named[0] if named and None not in variants else None


def _split(file: str) -> tuple[str, str]:
    folder, _, name = file.rpartition("/")
    return folder, name


def _parse_hub_link(url: str) -> HubReference | None:
    from huggingface_hub import constants

    base = f"{constants.ENDPOINT}/"
    match = re.match(r"^([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?#]+)", url.removeprefix(base))
    if not url.startswith(base) or match is None:
        return None
    return HubReference(match[1], match[3], None if match[2] == "main" else match[2])


def _checked_local(path: Path, kind: str) -> Path:
    if kind == "file" and path.is_dir():
        raise FetchError(f"{path} is a folder where a file is needed.")
    if kind == "folder" and not path.is_dir():
        raise FetchError(f"{path} is a file where a folder is needed.")
    return path


def _explain_unresolved(text: str, kind: str, is_url: bool) -> str:
    if is_url:
        return f"{text} is a web address, and a folder is needed: give a local folder or a hub id owner/repository."
    if _HUB_ID.match(text):
        return f"{text} does not exist here, and a hub id names a folder; for a file give hf://{text}/path/to/file."
    return (
        f"{text} does not exist (looked in {Path.cwd()}); allowed are a local {kind if kind != 'any' else 'path'}, "
        "hf://owner/repository/path, a hub id owner/repository (folders) or an http(s) URL."
    )


def _download(url: str) -> Path:
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME) / "sana" / "downloads"
    return download(url, folder, offline=bool(constants.HF_HUB_OFFLINE))


def _fetch_file(hub: HubReference) -> Path:
    from huggingface_hub import hf_hub_download

    if not hub.path:
        raise FetchError(f"{hub} names a repository where a file is needed: add the path of the file.")
    try:
        path = Path(hf_hub_download(hub.repo_id, hub.path, revision=hub.revision))
    except Exception as error:
        raise _explain(hub, error) from error
    _verify(path, str(hub))
    return path


def _fetch_folder(hub: HubReference, variant: str | None, allow_patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        if allow_patterns is None:
            allow_patterns = _patterns_for(hub, variant)
        elif hub.path:  # "*" matches slashes too: stay inside the folder
            allow_patterns = [f"{hub.path}/{pattern}" for pattern in allow_patterns]
        root = Path(snapshot_download(hub.repo_id, revision=hub.revision, allow_patterns=list(allow_patterns)))
    except Exception as error:
        raise _explain(hub, error) from error
    folder = root / hub.path if hub.path else root
    if not folder.is_dir():
        raise FetchError(f"{hub} is no folder of the repository {hub.repo_id}.")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _verify(file, f"{hub}/{file.relative_to(folder).as_posix()}")
    return folder


def _patterns_for(hub: HubReference, variant: str | None) -> list[str]:
    """The files to fetch; without a connection only the small ones that a complete cached folder must have."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{hub.path}/" if hub.path else ""
    cached_only = [f"{prefix}model_index.json", f"{prefix}config.json", f"{prefix}*/config.json"]
    if constants.HF_HUB_OFFLINE:
        return cached_only
    try:
        files = HfApi().list_repo_files(hub.repo_id, revision=hub.revision)
    except Exception as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):  # the hub, or the client, refuses: no cache can help
            raise
        logger.warning("could not list %s (%s); looking in the cache", hub, error)
        return cached_only
    return select_variant([file for file in files if file.startswith(prefix)], variant)


def _verify(path: Path, what: str) -> None:
    """Checks a cached file against the hash the hub promised (its etag), once; a wrong file is removed.

    huggingface_hub names a blob after its etag but checks only the size.
    """
    from huggingface_hub import constants

    blob = path.resolve()
    etag = blob.name
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        logger.debug("%s has no hash to check (the cache holds no links)", what)
        return
    stat = blob.stat()
    mark = Path(constants.HF_HOME) / "sana" / "verified" / f"{etag}-{stat.st_size}-{stat.st_mtime_ns}"
    if mark.exists():
        return
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {stat.st_size}\0".encode())
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise FetchError(
            f"{what} arrived damaged: its hash is {digest.hexdigest()} and the hub promised {etag}; "
            "the file was removed, so try again."
        )
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        logger.debug("%s is sound; the check will be repeated, as %s", what, error)


def _explain(hub: HubReference, error: Exception) -> FetchError:
    """One sentence for what the hub client raised, most specific first."""
    from huggingface_hub import constants, errors

    if isinstance(error, FetchError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        reason = (
            f"the repository is gated: accept its terms at {constants.ENDPOINT}/{hub.repo_id}, then set HF_TOKEN "
            "or run `hf auth login`"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"the repository has no revision {hub.revision or 'main'!r}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = f"{constants.ENDPOINT} has no such repository, or it is private: check the name and HF_TOKEN"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        reason = _explain_unreachable(error)
    elif isinstance(error, errors.EntryNotFoundError):
        reason = f"the repository has no file {hub.path!r}"
    elif isinstance(error, errors.HFValidationError):
        reason = "the name is not valid on the hub"
    elif status is not None:
        reason = f"{constants.ENDPOINT} answered with status {status}"
    else:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no detail'}"
    return FetchError(f"Could not fetch {hub}: {reason}.")


def _explain_unreachable(error: Exception) -> str:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and it is not in the cache {cache}: unset it, or download it beforehand"
    cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status}, and it is not in the cache {cache}"
    return f"{constants.ENDPOINT} could not be reached, and it is not in the cache {cache}"


def hub_settings() -> dict[str, str | bool]:
    """Returns what huggingface_hub does here: endpoint, cache folders, whether it is offline and has a token.

    The token itself is not among it.
    """
    from huggingface_hub import constants, get_token

    return {
        "endpoint": constants.ENDPOINT,
        "home": constants.HF_HOME,
        "cache": constants.HF_HUB_CACHE,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": get_token() is not None,
    }
