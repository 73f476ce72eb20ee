"""Bytes on disk: atomic writes that survive a kill, the run directory and its lock."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from educe.errors import MachineError, RunError
from educe.files.atomic import directory, need_space, sized, told, verify, write_json, write_text
from educe.files.run_dir import RunDir, find_run
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=50, deadline=None, derandomize=True)
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


# atomic directories


def build(path: Path, **files: bytes) -> Path:
    with directory(path, about={"stage": "test", "step": 7}) as part:
        for name, content in files.items():
            (part / "deep").mkdir(exist_ok=True)
            (part / "deep" / name).write_bytes(content)
    return path


def names(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir())


def test_a_directory_is_listed_and_verifies(tmp_path: Path) -> None:
    manifest = verify(build(tmp_path / "made", a=b"first", b=b""))
    assert isinstance(manifest, dict)
    assert {k: v for k, v in manifest.items() if k != "files"} == {"stage": "test", "step": 7}
    assert manifest["files"]["deep/a"]["bytes"] == 5
    assert set(manifest["files"]) == {"deep/a", "deep/b"}
    assert names(tmp_path) == ["made"]


def test_a_second_build_replaces_the_first_whole(tmp_path: Path) -> None:
    build(tmp_path / "made", a=b"old", gone=b"old")
    build(tmp_path / "made", a=b"new")
    assert names(tmp_path / "made" / "deep") == ["a"]
    assert isinstance(verify(tmp_path / "made"), dict)
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [True, False])
def test_an_error_inside_leaves_the_old_state(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    if before:
        build(tmp_path / "made", a=b"old")
    with pytest.raises(error), directory(tmp_path / "made", about={}) as part:  # noqa: PT012
        (part / "half").write_bytes(b"new")
        raise error
    assert names(tmp_path) == (["made"] if before else [])
    if before:
        assert isinstance(verify(tmp_path / "made"), dict)
        assert (tmp_path / "made" / "deep" / "a").read_bytes() == b"old"


@posix
def test_a_kill_inside_leaves_the_old_state(tmp_path: Path) -> None:
    build(tmp_path / "made", a=b"old")
    script = (
        "import os, sys, signal; from pathlib import Path; from educe.files.atomic import directory\n"
        "with directory(Path(sys.argv[1]), about={}) as part:\n"
        "    (part / 'a').write_bytes(b'new'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "made")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert isinstance(verify(tmp_path / "made"), dict)
    assert (tmp_path / "made" / "deep" / "a").read_bytes() == b"old"
    build(tmp_path / "made", a=b"newer")
    assert (tmp_path / "made" / "deep" / "a").read_bytes() == b"newer"


def test_a_file_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("mine")
    with pytest.raises(MachineError) as caught:
        build(tmp_path / "made", a=b"")
    assert caught.value.code == "E-SYS-004"
    assert (tmp_path / "made").read_text() == "mine"
    assert names(tmp_path) == ["made"]


def files_in(place: Path) -> list[Path]:
    return sorted(p for p in place.rglob("*") if p.is_file())


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """All of them, one at a time. A bit in the name of the manifest's own hash is harmless: nothing that is said changes."""
    made = build(tmp_path / "made", a=b"\x00first", b=b"second\n")
    good = verify(made)
    assert isinstance(good, dict)
    for file in files_in(made):
        content = file.read_bytes()
        for at in range(len(content)):
            damaged = [
                content[:at],
                *(content[:at] + bytes([content[at] ^ 1 << b]) + content[at + 1 :] for b in range(8)),
            ]
            for bad in damaged:
                file.write_bytes(bad)
                found = verify(made)
                if isinstance(found, dict):
                    assert file.name == "manifest.json", (file.name, at)
                    assert {k: found[k] for k in good} == good
        file.write_bytes(content)
    assert verify(made) == good


@few
@given(st.dictionaries(st.sampled_from("abcde"), st.binary(max_size=50), min_size=1), st.data())
def test_missing_and_longer_files_are_found(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        made = build(Path(place) / "made", **files)
        assert isinstance(verify(made), dict)
        victim = data.draw(st.sampled_from(files_in(made)))
        if data.draw(st.booleans()):
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes() + b"x")
        assert isinstance(verify(made), str)


@pytest.mark.parametrize(
    "manifest", ["[]", "3", "{}", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {}}}', "{", "\udcff"]
)
def test_a_manifest_of_another_form_is_a_sentence(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
    assert isinstance(verify(tmp_path), str)


# files and space


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "f.txt", "ä\r\n")
    file = tmp_path / "new" / "f.txt"
    assert file.read_bytes() == "ä\r\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(file, {"a": float("nan")})
    with pytest.raises(MachineError) as caught:
        write_text(tmp_path / "new", "over a directory")
    assert caught.value.code == "E-SYS-004"
    assert file.read_bytes() == "ä\r\n".encode()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["f.txt"]


@posix
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    write_text(file, "old")
    with file.open() as reader:
        write_text(file, "new")
        assert reader.read() == "old"  # whoever reads keeps what was there
    script = (
        "import resource, sys; from pathlib import Path; from educe.files.atomic import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_text(Path(sys.argv[1]), 'x' * 5000)\n"
    )
    broken = subprocess.run([sys.executable, "-c", script, str(file)], check=False, capture_output=True, text=True)
    assert "E-SYS-002" in broken.stderr
    assert file.read_text() == "new"
    assert names(tmp_path) == ["f.txt"]


@posix
def test_a_reader_and_a_kill_see_whole_files_only(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    script = (
        "import sys; from pathlib import Path; from educe.files.atomic import write_text\n"
        "for i in range(10**9): write_text(Path(sys.argv[1]), str(i % 10) * 300_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(file)]) as writer:
        seen: set[str] = set()
        while len(seen) < 4:
            content = file.read_text() if file.exists() else ""
            assert content == "" or (len(content) == 300_000 and len(set(content)) == 1)
            seen.add(content[:1])
            assert writer.poll() is None
        writer.kill()
    content = file.read_text()
    assert len(content) == 300_000
    assert len(set(content)) == 1


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "there" / "yet", 1, "a test")
    with pytest.raises(MachineError) as caught:
        need_space(tmp_path / "not" / "there" / "yet", 10**18, "the model")
    assert caught.value.code == "E-SYS-002"
    assert "the model needs 1000000000.0 GB" in caught.value.found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught, told(tmp_path / "x"):
        Path("/dev/full").write_text("x")
    assert caught.value.code == "E-SYS-002"
    with pytest.raises(MachineError, match="broken") as caught, told(tmp_path / "x"):
        raise OSError(errno.EIO, "broken")
    assert caught.value.code == "E-SYS-004"


# the run directory


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path / "run"."""
    script = (
        "import sys, time; from pathlib import Path; from educe.files.run_dir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).lock('eval'): print('held', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_has_one_trainer_and_a_kill_frees_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    run = RunDir(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(RunError) as caught, run.lock():
            pytest.fail("two processes hold one lock")
        assert caught.value.code == "E-RUN-202"
        assert f"`educe eval`, process {holder.pid} on {socket.gethostname()}, since 2" in caught.value.found
    holder.kill()
    holder.wait()
    with run.lock(), pytest.raises(RunError), RunDir(tmp_path / "run").lock():
        pytest.fail("one process holds a lock twice")
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    with run.lock():
        pass


def make_run(path: Path, *, settings_at: int, metrics_at: int | None = None) -> Path:
    path.mkdir(parents=True)
    for name, at in (("recipe.resolved.json", settings_at), ("metrics.jsonl", metrics_at)):
        if at is not None:
            (path / name).write_text("{}")
            os.utime(path / name, (at, at))
    return path


def test_the_latest_run_is_found(tmp_path: Path) -> None:
    make_run(tmp_path / "z-old", settings_at=100)
    busy = make_run(tmp_path / "a-busy", settings_at=50, metrics_at=300)
    make_run(tmp_path / "new", settings_at=200, metrics_at=210)
    (tmp_path / "prepared").mkdir()
    assert find_run(None, tmp_path).path == busy
    assert find_run(tmp_path / "new", tmp_path).path == tmp_path / "new"
    shutil.rmtree(busy)
    assert find_run(None, tmp_path).path == tmp_path / "new"


def test_no_run_is_told(tmp_path: Path) -> None:
    for given_, runs in ((None, tmp_path), (None, tmp_path / "none"), (tmp_path, tmp_path), (tmp_path / "x", tmp_path)):
        with pytest.raises(RunError) as caught:
            find_run(given_, runs)
        assert caught.value.code == "E-RUN-001"


def test_the_run_that_is_meant_is_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made = make_run(runs / "tickets", settings_at=100)
    (tmp_path / "recipe.yaml").write_text("name: tickets\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    for given_, says in {
        "tickets": f"does not exist. Did you mean {made}?",
        "runs/ticket": f"does not exist. Did you mean {made}?",
        "nope": f"does not exist. Give one that `educe train` made, such as {made}.",
        "recipe.yaml": "is a file, and a run is a directory.",
        "runs": f"holds runs and is none itself. Give one of them, such as {made}.",
        "out": "is a model, and no run.",
    }.items():
        with pytest.raises(RunError) as caught:
            find_run(tmp_path / given_, runs)
        assert says in str(caught.value), given_


def test_what_a_run_has_not_written_yet_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert names(tmp_path) == []
    for file in (run.scores, run.metrics):
        with pytest.raises(RunError) as caught:
            run.load(file)
        assert caught.value.code == "E-RUN-002"
    write_json(run.scores, {"a": 1})
    assert run.load(run.scores) == {"a": 1}


def test_sizes_are_said_in_a_unit_of_their_own() -> None:
    said = [sized(n) for n in (0, 430_000, 64e6, 1.5e9, 7.2e10)]
    assert said == ["0.0 kB", "0.4 MB", "64.0 MB", "1.5 GB", "72.0 GB"]
