"""Exports and posteriors on the Hugging Face hub: read by `owner/name@revision`, written in one commit.

Only JSON and safetensors are downloaded. What a message says of a failure is its kind: a URL or a header may hold a secret.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpt_dist.distributed.hub import REMEDY, reach_hub
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage import layout

if TYPE_CHECKING:
    from bpt_dist.config import RunConfig

PATTERNS = ("*.json", "*.safetensors", "README.md")  # neither code nor pickles
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_UNAUTHORISED, _FORBIDDEN = 401, 403
POSTERIOR = (layout.POSTERIOR_FACTS, layout.POSTERIOR_TENSORS)
INIT_FILE = "method.init_file"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubPlace:
    """A repository of the hub, and the branch, tag or commit that is meant; its main branch where there is none."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_place(text: str) -> HubPlace | None:
    """Return the repository that `text` names; None where it is a path, as it is if its first part is a folder here."""
    found = _ID.fullmatch(text)
    if found is None or Path(text).exists() or (found["revision"] is None and Path(text).parent.is_dir()):
        return None
    return HubPlace(found["repository"], found["revision"])


def local_folder(place: Path, key: str = "") -> Path:
    """Return a path as it is; for an id of the hub, the folder of its files here, downloaded where they are not.

    In one process an id means one commit. Raises ConfigError where the hub has no such thing or cannot be asked, StorageError;
    `key` says in its message what the id was given for.
    """
    found = hub_place(str(place))
    try:
        return place if found is None else _downloaded(found)
    except ConfigError as error:
        raise ConfigError(f"{key}{error}") from None


def with_local_prompt(config: RunConfig) -> RunConfig:
    """Return the configuration with the downloaded folder of a prompt where `method.init_file` is an id of the hub.

    Raises ConfigError where the hub has no such prompt, or several; not where a posterior is given, which makes up for the prompt.
    """
    given = getattr(config.method, "init_file", None)
    if given is None or hub_place(str(given)) is None:
        return config
    try:
        folder = _only_prompt(local_folder(given, f"{INIT_FILE}: "), str(given))
    except ConfigError:
        if config.source.posterior is None:
            raise
        return config
    return config.model_copy(update={"method": config.method.model_copy(update={"init_file": folder})})


def _only_prompt(folder: Path, name: str) -> Path:
    """Return the folder of the prompt that a downloaded repository holds."""
    if (folder / layout.ADAPTER_CONFIG).is_file():
        return folder
    below = sorted(file.parent for file in folder.glob(f"*/{layout.ADAPTER_CONFIG}"))
    if len(below) == 1:
        return below[0]
    what = f"has prompts for {', '.join(place.name for place in below)}" if below else "holds no exported prompt"
    remedy = "download it by `hf download`, and give the folder of one of them" if below else "give the id of an exported prompt"
    raise ConfigError(f"{INIT_FILE}: {name} {what}; {remedy}")


def real_file(file: Path) -> Path:
    """Return what a link of the hub's cache means: readers that follow no links take it from there; any other path as it is."""
    from huggingface_hub import constants

    if not file.is_symlink():
        return file
    meant = file.resolve()
    return meant if meant.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()) else file


@functools.cache
def _downloaded(place: HubPlace) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    reach_hub()
    disable_progress_bars()
    with _explained(place, "read"):
        folder = snapshot_download(place.repository, revision=place.revision, allow_patterns=list(PATTERNS))
    return Path(folder)


def check_push(repository: str) -> HubPlace:
    """Return the repository to write to. Raises ConfigError for no `owner/name`, and where the hub cannot be asked."""
    from huggingface_hub import constants

    found = _ID.fullmatch(repository)
    if found is None:
        raise ConfigError(f"--push-to {repository}: is not owner/name; write for example --push-to lab/prompts")
    if not reach_hub():
        raise ConfigError(
            f"--push-to {repository}: {constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set; check the network and "
            "push again"
        )
    return HubPlace(found["repository"], found["revision"])


def push(folders: Mapping[str, Path], place: HubPlace, *, private: bool) -> str:
    """Write folders below their names in a repository, which is made where there is none; return the address of the commit.

    One folder called `` is the repository itself. All files come in one commit: who reads meanwhile sees the old ones or the new.
    Raises ConfigError where the hub refuses or breaks off, StorageError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    files = {
        str(Path(name) / file.relative_to(folder)): file
        for name, folder in folders.items()
        for pattern in PATTERNS
        for file in sorted(folder.rglob(pattern))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }
    api, revision = HfApi(), place.revision
    with _explained(place, "written"):
        api.create_repo(place.repository, exist_ok=True, private=private or None)
        if revision is not None:
            api.create_branch(place.repository, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(place.repository, revision=revision))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()
        ]
        if "" not in folders:
            if "README.md" not in there:
                operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=_page(folders).encode()))
            # An earlier export in the repository itself would hide those in its folders.
            own = (layout.TASK_RECORD, layout.ADAPTER_CONFIG, layout.ADAPTER_WEIGHTS, *POSTERIOR)
            operations += [CommitOperationDelete(path_in_repo=name) for name in own if name in there]
        commit = api.create_commit(place.repository, operations, commit_message="Export of bpt_dist", revision=revision)
    return str(commit.commit_url)


def _page(folders: Mapping[str, Path]) -> str:
    """Return the page of a repository of several exports."""
    lines = [f"- [{name}]({name})" for name in sorted(folders)]
    return "\n".join(["---\nlibrary_name: peft\ntags:\n- prompt-tuning\n---\n\n# Prompts of one run of bpt_dist\n", *lines]) + "\n"


@contextmanager
def _explained(place: HubPlace, done: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line with the remedy; `done` is what was to be done with the repository."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    transport: Any = HfHubHTTPError.__bases__[0]  # of whichever client the library uses
    try:
        yield
    except (transport, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise StorageError(
                f"{constants.HF_HUB_CACHE}: cannot be written ({error.strerror}); free space there, or set HF_HOME"
            ) from None
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            what, remedy = _refusal(cause, place, done)
        elif isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            what = "is not in the local cache, and the hub does not answer or is not to be asked"
            remedy = REMEDY
        else:
            what = f"could not be {done}: the connection broke off ({type(cause).__name__})"
            remedy = "check the network, and try again"
        raise ConfigError(f"{place} on {constants.ENDPOINT}: {what}; {remedy}") from None


def _refusal(error: OSError, place: HubPlace, done: str) -> tuple[str, str]:
    """Return what is wrong and what helps where the hub answered with an error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, GatedRepoError):
        return "is gated", f"ask for access at {constants.ENDPOINT}/{place.repository}, and {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {place.revision or 'main'!r}", "name a branch, a tag or a commit of it"
    if isinstance(error, RepositoryNotFoundError) and done == "read":
        return "is no folder here, and there is no such repository, or it is private", f"correct the name, or {LOGIN}"
    if status == _UNAUTHORISED or isinstance(error, RepositoryNotFoundError):
        return f"could not be {done}: the hub knows no token of yours", LOGIN
    if status == _FORBIDDEN:
        return f"could not be {done}: the token may not do this", f"use one that may write for {place.repository.partition('/')[0]}"
    return f"could not be {done}: the hub answered {status}", "try again later"
