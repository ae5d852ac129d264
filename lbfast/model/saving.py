"""Writing models as directories, and directories to the hub: `save_pretrained` with Hugging Face's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lbfast import files
from lbfast.model import checkpoint


def write(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    architecture: str,
    safe_serialization: bool = True,
    max_shard_size: int | str = "5GB",
) -> None:
    """config.json and the weights of one model, in the place of what was there when they are on the disk."""
    if folder.is_file():
        raise ValueError(f"save_directory: expected a directory, got the file {folder}")
    config.architectures = [architecture]
    with files.filling(folder, "config.json", checkpoint.weight_names(folder)) as staged:
        checkpoint.save_state_dict(state, staged, safe_serialization, max_shard_size)
        config.save_pretrained(staged)


def chosen_state(own: Mapping[str, Any], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The state dict to write: the model's own, or one of its keys. Raises ValueError for one of others."""
    if given is None:
        return own
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"state_dict: expected the {len(own)} keys of the model, got {len(given)}: {len(missing)} are missing, "
            f"{len(unexpected)} others, as {(missing or unexpected)[0]}"
        )
    return given


def check_plain(variant: str | None, save_function: Callable[..., Any] | None, safe_serialization: bool) -> None:
    """Raises ValueError where Hugging Face's arguments ask for files that are not written here."""
    if variant is not None:
        raise ValueError(f"variant: expected None: weights have the plain names of files, got {variant!r}")
    if not safe_serialization and save_function not in (None, torch.save):
        raise ValueError(
            f"save_function: expected None or torch.save for pytorch_model.bin, which is written here, got "
            f"{save_function!r}; safe_serialization=True takes any and needs none"
        )


def upload(
    folder: Path,
    repo_id: str | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    **commit: Any,
) -> str:
    """Uploads a directory to a repository of the hub, made where it does not exist. Returns the commit's address.

    Args:
        folder: with all that is to be there.
        repo_id: "name" or "owner/name"; None: the folder's name.
        token, private: of huggingface_hub's create_repo.
        commit: commit_message, commit_description, revision, create_pr of its upload_folder.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = str(api.create_repo(repo_id or folder.name, private=private, exist_ok=True).repo_id)
    return str(api.upload_folder(repo_id=name, folder_path=folder, **commit))
