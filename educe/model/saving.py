"""A transformers model into a directory, by whichever process writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_network(network: Any, directory: Path, **more: Any) -> None:
    """Weights and configs. Where a process group is open transformers writes on rank 0 alone and says nothing on others; here that
    process writes which holds the lock of the place, and it may be another rank."""
    network.should_save_on_this_rank = lambda is_main_process: True
    try:
        network.save_pretrained(directory, **more)
    finally:
        del network.should_save_on_this_rank
