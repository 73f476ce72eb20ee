"""A model whose weights are not here, to plan with: its configs and tokenizer, beside a weights file that is a header and a hole."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from educe.errors import ModelError
from educe.model.foreign import refuse_foreign
from educe.model.load import quiet

_KEPT = ("*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*")


@contextlib.contextmanager
def stand_in(directory: Path) -> Iterator[Path]:
    """A directory of the same name for as long as this lasts, in which every tensor has its size and no content. Raises `ModelError`
    for a config that transformers cannot build a causal language model of."""
    if not (directory / "config.json").is_file():
        raise ModelError(
            1, str(directory / "config.json"), "does not exist.", "Give the directory that holds config.json."
        )
    refuse_foreign(directory)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) / directory.resolve().name
        place.mkdir()
        for pattern in _KEPT:
            for file in directory.glob(pattern):
                if file.is_file() and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, place / file.name)
        _write_hole(place / "model.safetensors", _shapes(directory))
        yield place


def _shapes(directory: Path) -> dict[str, list[int]]:
    """Of the tensors that are stored: a tied head is not."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as e:
        said = str(e).splitlines()[0][:200]
        fix = "Give a causal language model that the installed transformers knows."
        raise ModelError(2, str(directory / "config.json"), f"describes no model that can be built: {said}", fix) from e
    return {name: list(p.shape) for name, p in network.named_parameters()}


def _write_hole(file: Path, shapes: dict[str, list[int]]) -> None:
    """In 16 bits, as most are stored; takes no room on a disk that keeps holes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
