"""What a model directory may not hold: code, pickles, settings that make a loader fetch or run code, files that are none.

A model directory is foreign, whoever named it. Nothing here executes or unpickles; what could is refused before a loader sees it.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from educe.errors import ModelError

_PICKLES = frozenset((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"))
# What transformers' own Trainer leaves beside its weights: no loader of models opens it.
_OF_TRAINERS = re.compile(r"(training_args\.bin|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth)$")
_CODE = frozenset((".py", ".pyc", ".so", ".pyd"))
_MAX_SETTINGS_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = 512 * 2**20  # tokenizers and indexes: the largest known have 35 MB
_TEXTS = frozenset((".json", ".jinja", ".md", ".model"))
# Settings by which transformers imports a module of the directory or of the Hub.
_RUNS = ("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "use_kernels", "kernel_config")
# Settings that name an implementation; of the form ORG/NAME they name a compiled kernel on the Hub.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def refuse_foreign(directory: Path) -> None:
    """Raise `ModelError` for what a loader could execute, follow elsewhere, or read forever.

    In the Hub's cache, which other tools fill as well, code and pickles may lie beside safetensors: nothing opens them.
    """
    if (directory / "adapter_config.json").is_file():
        found_in = "names another model, to which its weights are adapters."
        fix = "Merge the adapters first (peft's merge_and_unload and save_pretrained), and give that directory."
        raise ModelError(102, str(directory / "adapter_config.json"), found_in, fix)
    shared = directory.parent.name == "snapshots"
    has_safetensors = any(directory.glob("*.safetensors"))
    for file in sorted(directory.iterdir()):
        try:
            found = file.stat()
        except OSError:  # a link to nothing: whoever needs the file says so
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ModelError(2, str(file), "is not a regular file.", "Do not use this model.")
        most = _MAX_SETTINGS_BYTES if file.name.endswith("config.json") else _MAX_TEXT_BYTES
        if file.suffix in _TEXTS and found.st_size > most:
            raise ModelError(2, str(file), f"is larger than {most // 2**20} MB.", "Download the model again.")
        if not shared and stat.S_ISREG(found.st_mode):
            _refuse_name(file, has_safetensors=has_safetensors)
    for file in sorted(directory.glob("*config.json")):
        _refuse_settings(file)


def _refuse_name(file: Path, *, has_safetensors: bool) -> None:
    fix = "Use a copy of the directory without it; nothing here needs it."
    if file.suffix.lower() in _CODE:
        raise ModelError(102, str(file), "is code, and a model needs none.", fix)
    if file.suffix.lower() in _PICKLES and has_safetensors and not _OF_TRAINERS.match(file.name):
        raise ModelError(101, str(file), "may be a pickle, which runs code when it is opened.", fix)


def _refuse_settings(file: Path) -> None:
    """Look at every key of a settings file, however deep."""
    try:
        waiting: list[Any] = [json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(2, str(file), f"cannot be read: {e}.", "Download the model again.") from e
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        if not isinstance(value, dict):
            continue
        waiting.extend(value.values())
        for key, inner in value.items():
            if key in _RUNS and inner:
                found = f"wants to run its own code ({key})."
                raise ModelError(102, str(file), found, "Use a model that transformers supports itself.")
            if key.strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and "/" in str(inner):
                found = f"wants to run code from the Hub ({key}: {str(inner)[:60]!r})."
                raise ModelError(102, str(file), found, f"Remove {key} from it.")
