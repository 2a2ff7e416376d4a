"""Deltas on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from jdelta import folder


def fetch(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A folder with a saved delta: the path itself, or a copy of a repository of the Hub.

    Args:
      source: a folder, or `"user/name"`.
      revision: branch, tag or commit of the repository.

    Raises:
      FileNotFoundError: there is neither a folder nor a repository of that name.
      ConnectionError: there is no such folder, and the Hub cannot be reached.
    """
    if os.path.isdir(source) or not isinstance(source, str):
        return Path(source)
    files = [folder.CONFIG, folder.TENSORS]
    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=files))
    except errors.HFValidationError:
        raise FileNotFoundError(f"there is no folder {source!r}, and it is no name of a repository.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if isinstance(error, errors.RevisionNotFoundError) else ""
        raise FileNotFoundError(
            f"there is no folder {source!r}, and the Hub has no such repository{at} (or it is private, "
            "and the token does not open it)."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(
            f"there is no folder {source!r}, and the Hub cannot be asked for a repository of that name: {error}"
        ) from error


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "A delta by jdelta",
    create_pr: bool = False,
) -> str:
    """Uploads a folder with a saved delta and returns the address of the commit; as `DeltaModel.push_to_hub`."""
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(path),
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        )
    except errors.HfHubHTTPError as error:
        raise PermissionError(f"the Hub does not take {repo_id!r}: {error}") from error
    except (errors.OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(f"the Hub cannot be reached to upload {repo_id!r}: {error}") from error
