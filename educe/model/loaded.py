"""What was loaded is what the files hold: no weight made up, none left out, none that is no number."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from educe.errors import ModelError
from educe.model.describe import weight_files

_ROWS = 64  # of a head that are compared with the embedding's


def prove_loaded(network: Any, missing: Collection[str], directory: Path, *, packed: bool = False) -> None:
    """`missing` are the weights that the files lack and transformers filled at random; `packed`: some are codes now, which hide a NaN,
    so the files are looked at. Raises `ModelError`."""
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        found = f"the files lack {', '.join(names[:3])}{more}, which would be random numbers."
        tied = (
            "; if it shares the embedding, set tie_word_embeddings: true in config.json" if _is_head(names[0]) else ""
        )
        raise ModelError(203, str(directory), found, f"Download the model again{tied}.")
    for name, weight in _stored(directory) if packed else network.named_parameters():
        if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) and not bool(
            torch.isfinite(weight).all()
        ):
            found = f"{name} holds NaN or infinity."
            raise ModelError(203, str(directory), found, "Use another checkpoint: this one is spoilt.")
    if getattr(network.config.get_text_config(), "tie_word_embeddings", False):
        _prove_tied(network.get_input_embeddings().weight, directory)


def _stored(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the files, one after the other."""
    for file in weight_files(directory):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def _is_head(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight"))


def _prove_tied(shared_VD: torch.Tensor, directory: Path) -> None:
    """A head in the files that differs from the embedding would be dropped where the config ties the two."""
    for file in weight_files(directory):
        with safe_open(file, "pt") as tensors:
            for name in filter(_is_head, tensors.keys()):
                rows = tensors.get_slice(name)[:_ROWS].to(shared_VD)
                if not torch.equal(rows, shared_VD[:_ROWS]):
                    found = f"holds {name} of its own, and config.json says that it is the embedding."
                    raise ModelError(203, str(file), found, "Set tie_word_embeddings: false in config.json.")
