"""Deltas on the Hugging HostAdapter Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from jdelta.core.config import shown
from jdelta.saved import folder

LOGIN = "`hf auth login` or the environment variable HF_TOKEN gives it a token"


def fetch(
    source: str | os.PathLike[str],
    revision: str | None = None,
    files: Sequence[str] = (folder.CONFIG, folder.TENSORS),
) -> Path:
    """A folder with a saved delta: the path itself, or a copy of a repository of the Hub.

    The copy lies in huggingface_hub's cache, and is taken from there if the Hub cannot be reached.

    Args:
      source: a folder, or `"user/name"`. What exists on the disk goes first.
      revision: branch, tag or commit of the repository.
      files: which files to download, those of them that the repository has.

    Raises:
      FileNotFoundError: there is neither a folder nor a repository of that name, no such revision, or none of the
        files in it.
      PermissionError: the repository is not open to this token.
      ConnectionError: there is no such folder, and the Hub cannot be reached.
      TypeError: it is no path.
      ValueError: a revision of a folder.
    """
    if not isinstance(source, str | os.PathLike):
        what = (
            f"an attached {type(source).__name__}: call its finetuned()"
            if hasattr(source, "finetuned")
            else shown(source)
        )
        raise TypeError(f"a delta comes from a folder or from 'user/name' on the Hub, got {what}.")
    if not isinstance(source, str) or os.path.exists(source):
        if revision is not None:
            raise ValueError(f"{os.fspath(source)!r} is a path, and only repositories have a revision ({revision!r}).")
        return Path(source)
    if not _is_repo_id(source):
        raise FileNotFoundError(f"there is no folder {source!r}, and a repository of the Hub is named 'user/name'.")
    try:
        copy = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(files)))
        if any((copy / file).is_file() for file in files):
            return copy
        held = huggingface_hub.HfApi().list_repo_files(source, revision=revision)
    except Exception as error:
        if not _is_of_the_hub(error):
            raise
        at = "" if revision is None else f" at revision {revision!r}"
        asked = f"there is no folder {source!r}, and the Hub gives no repository of that name{at}"
        raise _explained(error, asked) from error
    raise FileNotFoundError(
        f"the repository {source!r} holds no saved delta: {' and '.join(files)} are missing; it holds "
        f"{', '.join(held) or 'nothing'}."
    )


def push(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "A delta by jdelta",
    create_pr: bool = False,
) -> str:
    """Uploads the files of a delta, name to content, in one commit; returns its address, as `DeltaModel.push_to_hub`.

    The repository and the branch `revision` are made if need be. A model card without jdelta's mark stays, as in
    `folder.write`.

    Raises:
      PermissionError: the token does not allow it, or there is none.
      FileNotFoundError: there is no such pull request or commit to start from.
      ConnectionError: the Hub cannot be reached, or fails.
      ValueError: the Hub refuses the name, or `private` was asked of a repository that is public.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"a repository of the Hub is a string, 'user/name', got {shown(repo_id)}.")
    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user, if left out
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"the repository {repo_id!r} is there already, and is public; private=True is for new ones. Make it "
                "private in its settings, or leave out private."
            )
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep = set() if _may_replace_card(api, repo_id, revision) else {folder.CARD}
        return api.create_commit(
            repo_id,
            [huggingface_hub.CommitOperationAdd(name, data) for name, data in files.items() if name not in keep],
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        ).commit_url
    except errors.HFValidationError as error:
        raise ValueError(f"the Hub does not take {repo_id!r}: {error}") from error
    except Exception as error:
        if not _is_of_the_hub(error):
            raise
        raise _explained(error, f"the Hub does not take {repo_id!r}") from error


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def _may_replace_card(api: huggingface_hub.HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has no model card, or one by jdelta."""
    # Not by hf_hub_download: its cache would shadow a commit that has the delta, and another folder outlives a kill.
    url = huggingface_hub.hf_hub_url(repo_id, folder.CARD, revision=revision, endpoint=api.endpoint)
    response = get_session().get(url, headers=build_hf_headers(token=api.token), timeout=60)
    try:
        hf_raise_for_status(response)
    except errors.EntryNotFoundError:
        return True
    return folder.MARK.encode() in response.content


def _is_of_the_hub(error: Exception) -> bool:
    """Whether it comes from the Hub or the way there, and not from the disk or a wrong argument.

    In version 0 of huggingface_hub such errors are `OSError`s without a number; later ones let those of httpx through.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return False
    ways = (OSError, RuntimeError, json.JSONDecodeError)  # JSON: the login page of a network
    return isinstance(error, ways) or type(error).__module__.startswith(("httpx", "httpcore"))


def _explained(error: Exception, asked: str) -> Exception:
    """What is raised in place of an error of huggingface_hub."""
    cause: BaseException = error
    if isinstance(
        error, errors.LocalEntryNotFoundError | RuntimeError
    ):  # an uninformative wrapper: the cause is behind it
        cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    if isinstance(cause, errors.GatedRepoError):
        return PermissionError(f"{asked}: its owner grants access to it. Ask for it on its page; {LOGIN}.")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{asked}: it has none, or it is private, and the token does not open it; {LOGIN}.")
    if isinstance(cause, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{asked}: the repository has no such revision.")
    if status in (401, 403):
        return PermissionError(f"{asked}: the token does not allow it, or there is none; {LOGIN}. {cause}")
    if isinstance(cause, errors.BadRequestError):
        return ValueError(f"{asked}: {cause}")
    return ConnectionError(f"{asked}: it cannot be reached, or it fails. {cause}")
