"""An exported directory onto the Hub. The token comes from the environment and is in no message."""

from __future__ import annotations

import os
import re
from pathlib import Path

from educe.errors import MachineError, UsageError
from educe.model.source import Say
from educe.secrets import redacted

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_push(name: str) -> str:
    """The token with which `name` may be written; before any work is done. Raises `UsageError`."""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(101, "--push", f"{name[:80]!r} is no name of a repository.", "Give ORG/NAME.")
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        fix = "Make a token with write access on the Hub's settings page and set HF_TOKEN in the environment."
        raise UsageError(101, "--push", "needs a token, and HF_TOKEN is not set.", fix)
    return token


def push(directory: Path, name: str, token: str, say: Say) -> str:
    """Upload `directory` in one commit to the model repository `name`, made private where it is not there; returns its address.

    Raises `MachineError`; the directory stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    say(f"uploading to {name} (private where it is new)")
    try:
        made = api.create_repo(name, private=True, exist_ok=True, repo_type="model")
        api.upload_folder(
            folder_path=directory, repo_id=name, repo_type="model", commit_message=f"Export {directory.name}"
        )
    except Exception as e:  # of requests, of the Hub, of the disk: all end the same, and may quote what was sent
        first = redacted(str(e).replace(token, "***")).strip().split("\n")[0][:200]
        found = f"could not be uploaded ({type(e).__name__}: {first})."
        fix = f"The export is in {directory}. Check the network and what the token may do, then: hf upload {name} {directory}"
        raise MachineError(6, name, found, fix) from None
    return str(made)
