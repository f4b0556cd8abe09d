"""The hub, for configs that name it: a revision becomes a commit, and files come into the local cache.

A hub that does not answer, or answers with 429 or 5xx, is asked again after waits that double; then, or with
HF_HUB_OFFLINE=1, what the cache holds is used. Nothing else in the project opens a socket.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from tasks.disk import refusal
from tasks.errors import UserError

DESCRIPTION = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
CODE = ["*.py"]  # only for a model whose code may run (tasks/trust.py)
RepoType = Literal["model", "dataset"]
WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between five tries
Answer = TypeVar("Answer")


def resolve_commit(repo_id: str, revision: str | None, repo_type: RepoType, where: str) -> str:
    """The commit that a branch, tag or nothing (main) stands for now; offline, the one that the cache holds."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        asked = lambda: HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type)  # noqa: E731
        return str(patiently(asked).sha)
    except (OfflineModeIsEnabled, OSError, httpx.HTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise _refused(repo_id, revision, repo_type, where, error) from None
        if commit := _cached_commit(repo_id, revision, repo_type):
            return commit
        raise _refused(repo_id, revision, repo_type, where, error) from None
    except HFValidationError as error:
        raise _refused(repo_id, revision, repo_type, where, error) from None


def fetch_model_description(repo_id: str, commit: str, where: str, code: bool = False) -> Path:
    """The folder of the cache with the model's config and tokenizer, fetched if need be."""
    return _snapshot(repo_id, commit, [*DESCRIPTION, *CODE[not code :]], where)


def fetch_model(repo_id: str, commit: str, where: str = "", code: bool = False) -> Path:
    """The same folder with its weights too; safetensors only."""
    return _snapshot(repo_id, commit, [*DESCRIPTION, "*.safetensors", *CODE[not code :]], where)


def patiently(ask: Callable[[], Answer]) -> Answer:
    """The answer, after as many tries as it takes and `WAITS_SECONDS` allows; then the last error."""
    for wait in WAITS_SECONDS:
        try:
            return ask()
        except Exception as error:
            if not passes(error):
                raise
            time.sleep(wait)
    return ask()


def passes(error: BaseException) -> bool:
    """Whether a failure may go away by itself: no answer, too many requests, or a fault of the server."""
    import httpx
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = cause_of(error)
    if is_offline_mode() or isinstance(cause, OfflineModeIsEnabled):  # a ConnectionError, but waiting mends nothing
        return False
    status = _status(cause)
    if status is not None:
        return status == 429 or status >= 500
    return isinstance(cause, httpx.TransportError | ConnectionError | TimeoutError)


def cause_of(error: BaseException) -> BaseException:
    """What went wrong with the hub, below what libraries made of it (`datasets`: a missing file)."""
    import httpx

    below: BaseException | None = error
    while below is not None:
        if _status(below) is not None or isinstance(below, httpx.TransportError | ConnectionError | TimeoutError):
            return below
        below = below.__cause__ or below.__context__
    return error


def explain(error: BaseException) -> str:
    """The first line of what went wrong, and how often it was tried."""
    cause = cause_of(error)
    first_line = str(cause).strip().split("\n")[0] or type(cause).__name__
    return f"{first_line} (asked {1 + len(WAITS_SECONDS)} times)" if passes(error) else first_line


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _snapshot(repo_id: str, commit: str, patterns: list[str], where: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download

    try:
        return Path(patiently(lambda: snapshot_download(repo_id, revision=commit, allow_patterns=patterns)))
    except (OSError, httpx.HTTPError) as error:
        folder = _cache_of(repo_id, "model") / "snapshots" / commit
        if _holds(folder, weights="*.safetensors" in patterns):
            return folder
        full = refusal(error, _cache_of(repo_id, "model"), "HF_HOME")  # the cache's disk need not be that of runs/
        raise full or _refused(repo_id, commit, "model", where, error) from None


def _holds(folder: Path, weights: bool) -> bool:
    """Whether a folder of the cache is complete: every shard that its index names, or the one file of weights."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    needed = {"config.json"} | (shards if weights else set())
    return all((folder / name).is_file() for name in needed)


def _cached_commit(repo_id: str, revision: str | None, repo_type: RepoType) -> str | None:
    folder = _cache_of(repo_id, repo_type)
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    return revision if revision and (folder / "snapshots" / revision).is_dir() else None


def _cache_of(repo_id: str, repo_type: RepoType) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"


def _refused(repo_id: str, revision: str | None, repo_type: str, where: str, error: Exception) -> UserError:
    asked = f"the {repo_type} {repo_id} at {revision or 'main'}"
    return UserError(
        f"{asked} is neither on the hub for us nor in the local cache: {explain(error)}",
        where=where,
        todo="check the id and the revision, HF_TOKEN for a gated one, and the network; or give a local folder",
    )
