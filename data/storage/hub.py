"""Files that a setting names: a local path, or an id on the Hugging Face hub with its commit.

The one place that knows what a hub id and a commit look like. Without a connection the hub's own
client repeats each request for 25 seconds before it says so; here one short question comes first.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.storage.paths import user_path

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?")
"""`owner/name`, or `owner/name/file`; the file may be a folder or lie in one."""
COMMIT = re.compile(r"[0-9a-f]{40}")
BRANCH = "a branch changes under your results"
TIMEOUT_S = 5.0
"""Longest wait for the hub's first answer."""


class HubError(ValueError):
    """A path or repository is neither here nor can be fetched; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a setting's path is to be, and what is fetched where it is a hub id."""

    patterns: Sequence[Sequence[str]] = ()
    """Files of a repository, in alternatives tried in this order; the last pattern of each must be
    there. Of `owner/name/file` it is the file alone, and without patterns nothing else is taken."""
    repository: str = "model"
    """The hub's kind of repository: model or dataset."""
    usable: Callable[[Path], bool] = Path.exists
    """Whether a local path can be taken as it is."""
    missing: str = ": no such folder or file"
    """What is said of a path that cannot."""
    revision: str = "revision"
    """Name of the setting of the commit, beside that of the path."""
    refresh: bool = False
    """Ask the hub first, as the cache may hold only a part; offline the cache serves."""


def resolve(setting: str, value: str, revision: str | None, wanted: Wanted) -> Path:
    """A local path as it is; a hub id at its commit from this machine's cache or from the hub.

    Raises:
        HubError: Neither is there, or the commit is none; names `setting` and says what to change.
    """
    path = user_path(value, setting)
    if value and wanted.usable(path):
        return path
    match = HUB_ID.fullmatch(value)
    if path.exists() or not match or not (match[2] or wanted.patterns):
        raise HubError(f"{setting}={value or '(empty)'}{wanted.missing}")
    if not revision:
        commit = f"{setting.rpartition('.')[0]}.{wanted.revision}"
        raise HubError(
            f"{setting}={value}{wanted.missing}; a hub id needs its 40-digit commit in {commit}"
        )
    check_commit(f"{setting}={value}", revision)
    return _from_hub(setting, value, revision, wanted)


def check_commit(what: str, revision: str) -> None:
    """Refuse a branch or tag.

    Raises:
        HubError: Begins with `what`.
    """
    if not COMMIT.fullmatch(revision):
        raise HubError(
            f"{what} has revision {revision!r}; give the 40-digit commit, because {BRANCH}"
        )


def _from_hub(setting: str, value: str, revision: str, wanted: Wanted) -> Path:
    match = HUB_ID.fullmatch(value)
    assert match is not None
    repository, file = match[1], (match[2] or "").rstrip("/")
    alternatives = [[file, f"{file}/*"]] if file else wanted.patterns
    failure = None
    for look in (fetch, cached) if wanted.refresh else (cached, fetch):
        try:
            for patterns in alternatives:
                folder = look(repository, revision, patterns, wanted.repository)
                if folder and any(folder.glob(file or patterns[-1])):
                    return folder / file
        except HubError as error:
            failure = error
    if failure is not None:
        raise HubError(
            f"{setting}={value} is not on this machine and cannot be fetched at commit {revision}: "
            f"{failure}; {setting}=/path/to/it takes a local copy"
        ) from failure
    needed = file or " or ".join(patterns[-1] for patterns in alternatives)
    raise HubError(f"{setting}={value}@{revision} has no {needed}")


def cached(
    repository: str, revision: str, wanted: Sequence[str], kind: str = "model"
) -> Path | None:
    """The folder in which an earlier `fetch` left files, perhaps not all; asks no network."""
    from huggingface_hub import snapshot_download  # only where a hub id is used
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(wanted),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def fetch(repository: str, revision: str, wanted: Sequence[str], kind: str = "model") -> Path:
    """A folder with the repository's files that fit the patterns; those of the cache stay there.

    Raises:
        HubError: There is no connection, no such repository or commit, or no permission.
    """
    from huggingface_hub import snapshot_download

    if reason := unreachable():
        raise HubError(reason)
    try:
        return Path(
            snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=list(wanted)
            )
        )
    except Exception as error:  # the client's network errors have no common base
        raise HubError(" ".join(str(error).split()) or type(error).__name__) from error


def unreachable() -> str:
    """Why the hub gives no answer whatever; empty where it gives one."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception as error:
        return f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    return ""
