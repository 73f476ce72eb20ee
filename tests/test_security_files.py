"""Checkpoints, paths and permissions: nothing is parsed before its hash, followed outside, read forever or left open to others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from educe.config import parse_recipe
from educe.data.finding import find_files
from educe.data.opening import open_data
from educe.errors import DataError, EduceError, RecipeError, UsageError
from educe.files.atomic import MANIFEST, _beside, directory, verify, write_new, write_text
from educe.files.hashes import hash_bytes, hash_json
from educe.training.checkpoint import newest_checkpoint

from payloads import bomb
from security_job import command, write_job

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes, links and permissions are others there")


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs is ended, and the test fails."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"still not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --- T2: own checkpoints -------------------------------------------------------------------------------------------------


def make(place: Path, step: int) -> Path:
    """A directory as a checkpoint is written."""
    made = place / f"step-{step:06d}"
    with directory(made, about={"step": step, "finished": False, "halvings": 0}) as part:
        (part / "weights.safetensors").write_bytes(b"w" * 100)
        (part / "inner").mkdir()
        (part / "inner" / "optimizer.safetensors").write_bytes(b"o" * 100)
    return made


def listed(made: Path, **files: Any) -> None:
    """Other files in the manifest, with a hash that is right: it was not damaged but written so."""
    manifest = json.loads((made / MANIFEST).read_text())
    manifest.pop("manifest_sha256")
    manifest["files"] |= {name.replace("__", "/"): value for name, value in files.items()}
    (made / MANIFEST).write_text(json.dumps({**manifest, "manifest_sha256": hash_json(manifest)}))


def entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hash_bytes(data)}


def names(name: str, data: bytes = b"secret") -> Callable[[Path], None]:
    """A manifest that names a file, which is there as it says."""

    def spoil(made: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            (made / name).write_bytes(data)
        listed(made, **{name: entry(data)})

    return spoil


def link(name: str, target: str) -> Callable[[Path], None]:
    def spoil(made: Path) -> None:
        outside = made.parent / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "weights.safetensors").write_bytes(b"w" * 100)
        (outside / "optimizer.safetensors").write_bytes(b"o" * 100)
        shutil.rmtree(made / name) if (made / name).is_dir() else (made / name).unlink()
        (made / name).symlink_to(target)

    return spoil


def pipe(name: str) -> Callable[[Path], None]:
    def spoil(made: Path) -> None:
        (made / name).unlink(missing_ok=True)
        os.mkfifo(made / name)

    return spoil


def moved(made: Path) -> None:
    made.rename(made.parent / "outside")
    made.symlink_to("outside")


def sparse(made: Path) -> None:
    with (made / MANIFEST).open("wb") as f:
        f.truncate(10**10)


def text(value: str) -> Callable[[Path], None]:
    return lambda made: (made / MANIFEST).write_text(value) and None


TRICKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bomb as weights": (lambda d: (d / "weights.safetensors").write_bytes(bomb(d.parent / "ran")), "bytes, expected"),
    "bomb as optimizer": (
        lambda d: (d / "inner" / "optimizer.safetensors").write_bytes(bomb(d.parent / "ran")),
        "bytes, expected",
    ),
    "bomb as manifest": (lambda d: (d / MANIFEST).write_bytes(bomb(d.parent / "ran")), "manifest cannot be read"),
    "bomb more": (lambda d: (d / "training_state.pt").write_bytes(bomb(d.parent / "ran")), "does not name"),
    "bomb deeper": (lambda d: (d / "inner" / "rng.pkl").write_bytes(bomb(d.parent / "ran")), "does not name"),
    "same size, other bytes": (lambda d: (d / "weights.safetensors").write_bytes(b"W" * 100), "SHA-256"),
    "upwards": (names("../secret"), "cannot be inside"),
    "upwards from below": (names("inner/../../secret"), "cannot be inside"),
    "absolute": (names("/etc/passwd"), "cannot be inside"),
    "another drive": (names("C:\\x"), "cannot be inside"),
    "here": (names("./weights.safetensors"), "cannot be inside"),
    "no name": (names(""), "cannot be inside"),
    "NUL": (names("a\0b"), "cannot be inside"),
    "a name too long": (names("a" * 5000), "cannot be inside"),
    "a link outside": (link("weights.safetensors", "../outside/weights.safetensors"), "link"),
    "a directory that is a link": (link("inner", "../outside"), "link"),
    "itself a link": (moved, "link"),
    "a pipe": (pipe("weights.safetensors"), "no regular file"),
    "a pipe more": (pipe("more"), "does not name"),
    "manifest is a pipe": (pipe(MANIFEST), "no regular file"),
    "manifest is a link": (lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).symlink_to("/dev/zero")), "no regular"),
    "manifest is a directory": (lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()), "no regular"),
    "a huge manifest": (sparse, "larger than"),
    "a deep manifest": (text("[" * 100_000), "cannot be read"),
    "a deep manifest in a key": (text('{"files": ' + '{"a":' * 100_000), "cannot be read"),
    "a manifest without a hash": (
        lambda d: (d / MANIFEST).write_text(json.dumps({"files": {}, "step": 9})),
        "differs from its own",
    ),
    "a huge size": (
        lambda d: listed(d, **{"weights.safetensors": {"bytes": 10**400, "sha256": "0"}}),
        "cannot be inside",
    ),
    "infinite size": (text('{"files": {"a": {"bytes": Infinity, "sha256": "0"}}}'), "cannot be read"),
    "5000 digits": (text('{"files": {"a": {"bytes": ' + "9" * 5000 + ', "sha256": "0"}}}'), "cannot be read"),
}


@pytest.mark.parametrize("what", TRICKS)
def test_a_checkpoint_that_is_not_as_it_was_written_is_moved_aside(tmp_path: Path, what: str) -> None:
    spoil, words = TRICKS[what]
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    spoil(bad)
    said: list[str] = []
    with within(10):
        found = newest_checkpoint(tmp_path, said.append, quarantine=True)
    assert found is not None
    assert (found[0], found[1]["step"]) == (good, 1)
    assert words in said[0], said
    assert len(said[0]) < 500
    assert not bad.exists()
    assert not (tmp_path / "ran").exists()


def test_good_directories_verify_with_what_systems_leave_in_them(tmp_path: Path) -> None:
    made = make(tmp_path, 1)
    (made / ".DS_Store").write_bytes(b"x")
    assert isinstance(verify(made), dict)


def test_a_bomb_with_a_right_hash_is_no_safetensors_file(tiny_model: Path, tmp_path: Path) -> None:
    """Whoever can write a manifest can write any file; even then nothing is unpickled."""
    assert command("train", write_job(tmp_path / "job", tiny_model))[0] == 0
    run = tmp_path / "job" / "runs" / "t"
    (made,) = (run / "checkpoints").glob("step-*")
    data = bomb(tmp_path / "ran")
    for name in json.loads((made / MANIFEST).read_text())["files"]:
        (made / name).write_bytes(data)
        listed(made, **{name: entry(data)})
    for words in (["eval", run], ["export", run, tmp_path / "out"]):
        exit_code, said = command(*words)
        assert (exit_code, "E-MODEL-002" in said, "Traceback" in said) == (2, True, False), said
    manifest = json.loads((made / MANIFEST).read_text())
    (made / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))  # its hash is wrong now
    exit_code, said = command("eval", run)
    assert (exit_code, "differs from its own SHA-256" in said) == (2, True), said
    assert not (tmp_path / "ran").exists()


# --- T4: paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../t", "/tmp/t", "a/b", ".", "..", ".t", "-t", "a\\b", '"a\\0b"', "a" * 101, "t\u202e", "~"]
)
def test_a_name_of_a_run_is_no_path(name: str) -> None:
    shown = name if name.startswith('"') else json.dumps(name, ensure_ascii=False)
    with pytest.raises(RecipeError, match="E-RECIPE-10"):
        parse_recipe(f"name: {shown}\nmodel: m\ndata: {{train: rows.jsonl}}\n", "recipe.yaml")


def test_only_regular_files_of_a_directory_are_data(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "rows.jsonl").write_text("{}\n")
    os.mkfifo(place / "pipe.jsonl")
    (place / "zero.jsonl").symlink_to("/dev/zero")
    (place / "gone.jsonl").symlink_to("nowhere")
    (place / "loop.jsonl").symlink_to("loop.jsonl")
    (place / "up").symlink_to("..")
    with within(10):
        assert find_files(str(place)) == [place / "rows.jsonl"]
        assert find_files(str(place / "*.jsonl")) == [place / "rows.jsonl"]
        for name in ("pipe.jsonl", "zero.jsonl", "gone.jsonl", "loop.jsonl"):
            with pytest.raises(DataError), open_data(find_files(str(place / name))[0]):
                pass


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_stops_before_it_is_unpacked(tmp_path: Path, kind: str) -> None:
    """2.4 GB of spaces behind a brace, 1000 to 1 and more: refused on the way, at the size where it can be no data."""
    import gzip

    block = b" " * 20_000_000
    if kind == "gzip":
        packed = gzip.compress(b"{") + gzip.compress(block) * 120
    else:
        zstandard = pytest.importorskip("zstandard")
        packed = zstandard.compress(b"{") + zstandard.compress(block) * 120
    (tmp_path / "rows.jsonl").write_bytes(packed)
    assert len(packed) * 900 < 120 * len(block)
    taken = 0
    try:
        with within(30), open_data(tmp_path / "rows.jsonl") as f:
            while piece := f.read(1 << 20):
                taken += len(piece)
    except DataError as e:
        assert e.code == "E-DATA-009"  # noqa: PT017 - how far it came is asked below
    assert taken <= 1_010_000_000


def test_nothing_is_written_over_something_else(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_job(tmp_path / "job", tiny_model)
    assert command("train", recipe)[0] == 0
    run, rows = tmp_path / "job" / "runs" / "t", tmp_path / "job" / "rows.jsonl"
    before = rows.read_bytes()
    (tmp_path / "link").symlink_to(rows)
    (tmp_path / "nowhere").symlink_to(tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "to full").symlink_to(tmp_path / "full")
    for target in (
        rows,
        run,
        tiny_model,
        tmp_path / "full",
        tmp_path / "to full",
        tmp_path / "link",
        tmp_path / "nowhere",
    ):
        exit_code, said = command("export", run, target)
        assert (exit_code, "Traceback" in said) == (2, False), (target, said)
    for target in (rows, tmp_path / "link", tmp_path / "nowhere"):
        exit_code, said = command("init", "--data", rows, "--model", tiny_model, "--out", target)
        assert (exit_code, "E-CLI-101" in said) == (2, True), (target, said)
        exit_code, said = command("inspect", recipe, "--html", target)
        assert (exit_code, "E-CLI-101" in said) == (2, True), (target, said)
    assert rows.read_bytes() == before
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    assert not (tmp_path / "new").exists()


# --- T15: others on the same machine -------------------------------------------------------------------------------------


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


def open_to_others(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


@pytest.mark.parametrize("there", [False, True])
def test_runs_prepared_data_and_cache_are_the_owners_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Whatever the umask; where `runs` was made by somebody and is open, what lies in it is not."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EDUCE_CACHE", str(cache))
    with umask(0):
        recipe = write_job(tmp_path / "job", tiny_model)
        runs = tmp_path / "job" / "runs"
        if there:
            runs.mkdir()
        for words in (
            ["train", recipe],
            ["eval", runs / "t"],
            ["report", runs / "t"],
            ["export", runs / "t", tmp_path / "out"],
        ):
            exit_code, said = command(*words)
            assert exit_code == 0, said
    assert open_to_others(runs) == there
    made = [runs / "t", runs / "prepared", *(runs / "prepared").iterdir(), *(runs / "t" / "checkpoints").iterdir()]
    made += [runs / "t" / "checkpoints", runs / "t" / "answers", cache, *(p for p in cache.rglob("*") if p.is_dir())]
    assert {p.name for p in cache.iterdir()} >= {"answers", "locks"}
    assert not [p for p in made if open_to_others(p)]
    assert open_to_others(tmp_path / "out")  # made to be given away, as the umask says


def test_a_temporary_name_is_never_a_link_that_somebody_laid(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    _beside(tmp_path / "recipe.yaml", "part").symlink_to(mine)
    write_text(tmp_path / "recipe.yaml", "x")
    assert (mine.read_text(), (tmp_path / "recipe.yaml").read_text()) == ("mine", "x")
    with pytest.raises(UsageError):
        write_new(mine, "y")
    _beside(tmp_path / "made", "part").symlink_to(tmp_path)
    with pytest.raises(EduceError), directory(tmp_path / "made", about={}):
        pass
    assert mine.read_text() == "mine"
