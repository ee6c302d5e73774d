"""Adapters on the Hugging Face Hub."""

import re
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from temporal_layers.adapters.files import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["local_folder", "upload"]

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_folder(
    source: str | PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that ``source`` names, or the copy of a repository ``"user/name"`` that is downloaded if need be.

    Only the two files of an adapter are fetched. A folder goes before a repository of the same name.

    Args:
        source: a folder, or a repository.
        revision: branch, tag or commit of the repository.
        token: for private ones; the one that is logged in if not given.
        local_files_only: take what was downloaded before and ask nobody.

    Raises:
        ValueError: if ``source`` is no folder here and the hub does not have it, or cannot be reached.
    """
    if Path(source).exists() or not isinstance(source, str) or not REPOSITORY.fullmatch(source):
        return Path(source)
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
            )
        )
    except (OSError, EntryNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"from_pretrained: expected a folder or a repository of the hub, got {source!r}: there is no such folder, "
            f"and the hub said {type(error).__name__}: {reason}; check the name and the connection, log in if it is "
            "private, or download it and pass the folder"
        ) from error


def upload(
    folder: str | PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload temporal layers",
    create_pr: bool = False,
) -> str:
    """Put the files of ``folder`` into a repository of the hub, made if needed, as one commit. Returns its address.

    Args:
        folder: what to upload.
        repo_id: ``"user/name"``.
        private: whether a new repository is private; the account's default if not given.
        token: with the right to write; the one that is logged in if not given.
        revision: branch.
        commit_message: of the commit.
        create_pr: open a pull request instead.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="model",
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return commit.pr_url or commit.commit_url
