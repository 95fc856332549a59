"""Files of a Hugging Face repository at a commit, from this machine's cache or from the hub.

Without a connection the hub's own client repeats each request for 25 seconds before it says so.
Here one short question comes before all others.
"""

from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 5.0
"""Longest wait for the hub's first answer."""


class HubError(ValueError):
    """A repository is neither here nor can be fetched; the message says why."""


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
