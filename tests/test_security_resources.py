"""Data that would take all memory or all time: a bounded peak, or a code. Each is read in a process of its own, which is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak from /proc")
MB = 10**6

READ = """
import json, sys, time
from pathlib import Path
from educe.data.finding import find_files
from educe.data.sources import read_rows
from educe.errors import EduceError, Refusal

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1000

import csv, orjson, educe.data.json_array, educe.data.tables
if sys.argv[2] == "parquet":
    import pyarrow.parquet
began, before, rows, codes, end = time.monotonic(), status("VmRSS"), 0, [], ""
try:
    for row in read_rows(find_files(sys.argv[1])[0]):
        rows += 1
        refused = [v for v in (row if isinstance(row, tuple) else (row, getattr(row, "value", None))) if isinstance(v, Refusal)]
        codes += [r.code for r in refused][: 5 - len(codes)]
except EduceError as e:
    end = e.code
print(json.dumps([rows, codes, end, status("VmHWM") - before, time.monotonic() - began]))
"""


def reading(file: Path) -> tuple[int, list[str], str, float, float]:
    """(rows, codes of the first refused ones, code of the end, MB of memory over the imports, seconds)."""
    words = [sys.executable, "-c", READ, str(file), file.suffix[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    file.unlink()
    assert done.returncode == 0, done.stderr
    rows, codes, end, peak_mb, seconds = json.loads(done.stdout)
    print(f"\n{file.name}: {rows} rows, {codes} {end}, {peak_mb:.0f} MB over the imports, {seconds:.1f} s")
    return rows, codes, end, peak_mb, seconds


def written(path: Path, pieces: Iterable[bytes]) -> Path:
    with path.open("wb") as f:
        f.writelines(pieces)
    return path


GOOD = b'{"prompt": "a", "completion": "b"}\n'
LONG = [b"x" * MB] * 60
DEEP = b"[" * 100_000 + b"]" * 100_000

# name of the file, its pieces, rows, how it ends (a code; "" at its end), most MB, most seconds
FILES: dict[str, tuple[str, Callable[[], Iterable[bytes]], int, str, float, float]] = {
    "a long row": ("a.jsonl", lambda: [b'{"prompt": "a", "completion": "', *LONG, b'"}\n'], 1, "", 400, 20),
    "a long row of an array": ("a.json", lambda: [b'[{"prompt": "a", "completion": "', *LONG, b'"}]'], 1, "", 700, 20),
    "a long field": ("a.csv", lambda: [b"prompt,completion\na,", *LONG, b"\n"], 1, "", 500, 20),
    "a field without an end": ("a.csv", lambda: [b'prompt,completion\na,"', *LONG], 0, "E-DATA-004", 500, 20),
    "many tiny rows": ("a.jsonl", lambda: (GOOD * 1000 for _ in range(300)), 300_000, "", 15, 30),
    "deep rows": ("a.jsonl", lambda: [b'{"messages": ' + DEEP + b"}\n", GOOD] * 20, 40, "", 30, 20),
    "a deep row of an array": ("a.json", lambda: [b"[" + DEEP + b"]"], 1, "", 30, 20),
    "many keys": (
        "a.jsonl",
        lambda: [b"{" + b",".join(b'"k%d": 1' % i for i in range(10**5)) + b"}\n"],
        1,
        "",
        100,
        20,
    ),
    "many columns": (
        "a.csv",
        lambda: [b",".join(b"c%d" % i for i in range(20_000)) + b"\n" + b"," * 19_999],
        1,
        "",
        100,
        5,
    ),
    "columns without names": ("a.csv", lambda: [b"," * 10**6 + b"\na\n"], 0, "E-DATA-004", 200, 20),
    "one bracket, many times": ("a.json", lambda: [b"[" * 5 * MB], 0, "E-DATA-004", 200, 20),
}


@pytest.mark.parametrize("what", FILES)
def test_memory_and_time_are_bounded(tmp_path: Path, what: str) -> None:
    name, pieces, rows, end, most_mb, most_s = FILES[what]
    found = reading(written(tmp_path / name, pieces()))
    assert (found[0], found[2]) == (rows, end)
    assert (found[3] < most_mb, found[4] < most_s) == (True, True)
    if what.startswith(("deep", "a deep")):
        assert found[1]
        assert set(found[1]) == {"E-DATA-102"}


@pytest.mark.parametrize("suffix", ["jsonl", *(pytest.param(s, marks=pytest.mark.slow) for s in ("json", "csv"))])
def test_a_row_of_no_length_ends_in_a_code(tmp_path: Path, suffix: str) -> None:
    """4 GB in one row: refused without reading on. The file is sparse and takes no room."""
    start = {"jsonl": b'{"prompt": "', "json": b'[{"prompt": "', "csv": b"prompt,completion\na,"}[suffix]
    with (tmp_path / f"a.{suffix}").open("wb") as f:
        f.write(start)
        f.truncate(4 * 10**9)
    rows, _, end, peak_mb, seconds = reading(tmp_path / f"a.{suffix}")
    assert (rows, end) == (0, "E-DATA-004" if suffix == "json" else "E-DATA-009")
    assert (peak_mb < 2500, seconds < 60) == (True, True)


def test_odd_parquet_ends_in_a_code(tmp_path: Path) -> None:
    """Its footer is foreign, too: cut, grown, filled with other bytes, or of another length than it says."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    from educe.data.sources import read_rows
    from educe.errors import EduceError

    table = pa.table({"prompt": ["a"] * 50, "completion": ["b"] * 50}).replace_schema_metadata({"pandas": "{" * 10_000})
    pq.write_table(table, tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    assert len(list(read_rows(tmp_path / "a.parquet"))) == 50
    size = len(good)
    spoiled = [good[:-8] + n.to_bytes(4, "little") + b"PAR1" for n in (0, 1, size, 2**31 - 1, 2**32 - 1)]
    spoiled += [good[:k] + bytes([good[k] ^ 255]) + good[k + 1 :] for k in range(4, size, max(1, size // 150))]
    spoiled += [good[: size // 2] + good[-8:], good[:4] + good[-8:], good + b"PAR1"]
    refused = 0
    for data in spoiled:
        (tmp_path / "b.parquet").write_bytes(data)
        try:
            list(read_rows(tmp_path / "b.parquet"))
        except EduceError as e:
            assert e.code.startswith("E-DATA-")  # noqa: PT017 - it may also be read: some bytes say nothing
            refused += 1
    assert refused > 20


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_a_thousand(tmp_path: Path) -> None:
    few = reading(written(tmp_path / "few.jsonl", [GOOD * 1000]))
    many = reading(written(tmp_path / "many.jsonl", (GOOD * 1000 for _ in range(1000))))
    assert (few[0], many[0]) == (1000, 10**6)
    assert many[3] < few[3] + 5
