"""What a recipe may call files: a file, a directory, a glob, a data set on the Hub, standard input; packed or not."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from educe.data.finding import empty_files, find_files, passed_over
from educe.data.reading import Reading, format_of_rows, read_row
from educe.data.sources import read_rows
from educe.errors import DataError, Refusal
from educe.types import Conversation, Document, Pair, Source

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(6)]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS)
HERE = Source(file="f", line=1)


def names(found: list[Path], base: Path) -> list[str]:
    return [f.relative_to(base).as_posix() for f in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a/c.jsonl",
        "a/d.csv",
        "README.md",
        "a/dataset_infos.json",
        ".hidden.jsonl",
        "_x/e.jsonl",
        "n.npy",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    return tmp_path


def test_a_directory_and_a_glob_are_their_data_files(tree: Path) -> None:
    assert names(find_files(str(tree)), tree) == ["a/c.jsonl", "a/d.csv", "b.jsonl"]
    assert names(passed_over(str(tree)), tree) == [".hidden.jsonl", "_x/e.jsonl", "a/dataset_infos.json", "n.npy"]
    assert names(find_files(f"{tree}/a/*.jsonl"), tree) == ["a/c.jsonl"]
    assert names(find_files(f"{tree}/b.jsonl"), tree) == ["b.jsonl"]
    assert names(find_files(str(tree), tree / "a"), tree) == ["b.jsonl"]  # not what educe wrote
    for spec, code in ((f"{tree}/*.zip", "E-DATA-010"), (f"{tree}/b.json", "E-DATA-001")):
        with pytest.raises(DataError, match=code):
            find_files(spec)


def test_a_file_without_a_row_is_left_out_where_others_hold_some(tree: Path) -> None:
    before = names(find_files(str(tree)), tree)
    empty = {"0.jsonl": b"", "blank.jsonl": b" \n\n", "a/list.json": b"[]\n", "z.csv": b"prompt,completion\n"}
    for name, held in empty.items():
        (tree / name).write_bytes(held)
    (tree / "0.jsonl.gz").write_bytes(gzip.compress(b""))
    (tree / "bad.jsonl").write_text("no row\n")  # it is no row, and not nothing
    assert names(find_files(str(tree)), tree) == sorted([*before, "bad.jsonl"])
    assert names(empty_files(str(tree)), tree) == sorted([*empty, "0.jsonl.gz"])
    assert "z.csv" in names(find_files(str(tree), header=("a", "b")), tree)
    assert names(find_files(f"{tree}/0.jsonl"), tree) == ["0.jsonl"]  # which is refused when it is read
    assert names(find_files(f"{tree}/*0.jsonl*"), tree) == ["0.jsonl", "0.jsonl.gz"]


def test_only_what_educe_wrote_is_passed_over(tree: Path) -> None:
    """A user's own file beside the data does not make the data ours, whatever its name."""
    (tree / "a" / "stages.json").write_text("[]")
    assert "a/c.jsonl" in names(find_files(str(tree), tree / "runs"), tree)
    (tree / "a" / "stages.resolved.json").write_text("{}")
    assert names(find_files(str(tree), tree / "runs"), tree) == ["b.jsonl"]


@pytest.mark.parametrize("kind", ["gzip", "zstd", "named gzip only"])
def test_packed_files_are_told_by_their_bytes(tmp_path: Path, kind: str) -> None:
    if kind == "zstd":
        packed = pytest.importorskip("zstandard").compress(LINES.encode())
    else:
        packed = LINES.encode() if "only" in kind else gzip.compress(LINES.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    assert [row for _, row in read_rows(tmp_path / "rows.jsonl.gz")] == ROWS


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    from educe.data.sources import read_span, spans_of

    many = [{"prompt": f"p{n}", "completion": "c" * (n % 40)} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "r.parquet", row_group_size=500)
    assert [row for _, row in read_rows(tmp_path / "r.parquet")] == many
    spans = spans_of(tmp_path / "r.parquet", 20_000)
    assert len(spans) > 2
    again = [(s.line, row) for span in spans for s, row in read_span(span)]
    assert again == list(enumerate(many, 1))


def test_a_data_set_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through huggingface_hub's own cache, laid out as it lays it out."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "datasets--org--talks"
    place = repo / "snapshots" / revision
    for name in ("data/train-00000.jsonl", "data/test-00000.jsonl", "README.md"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(LINES)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    code = "import sys; from educe.data.finding import find_files; print(*find_files(sys.argv[1]), sep='\\n')"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def found(spec: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True, check=False)
        return done.stdout.replace(str(place), "") or done.stderr.strip().splitlines()[-1]

    assert found("org/talks").split() == ["/data/train-00000.jsonl"]
    assert found("hf://datasets/org/talks").split() == ["/data/train-00000.jsonl"]
    assert found("hf://datasets/org/talks/data/test-00000.jsonl").split() == ["/data/test-00000.jsonl"]
    assert found(f"hf://datasets/org/talks@{revision}/data").split() == [
        "/data/test-00000.jsonl",
        "/data/train-00000.jsonl",
    ]
    assert "E-DATA-010" in found("hf://datasets/org/others")
    assert "E-DATA-010" in found("hf://datasets/org/talks/nothing.jsonl")


def test_standard_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "educe", "data", "-", "--json"], input=LINES.encode(), capture_output=True, check=False
    )
    found = json.loads(done.stdout)
    assert (done.returncode, found["format"], found["rows"]) == (0, "prompt/completion", 6)


# --- one function for each format: real files ----------------------------------------------------------------------------

REAL = {
    "alpaca_5000.json": "alpaca",
    "self_instruct_seed_tasks.jsonl": None,
    "sharegpt_dummy.json": "sharegpt",
    "gsm8k/test.jsonl": "question/answer",
    "dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl": "prompt/response",
    "oasst/en_100_tree.jsonl": "oasst tree",
    "oasst/en_100_message.jsonl": "oasst message",
    "super_ni": "natural instructions",
    "tinystories.txt": "text",
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_recognised(shared: Path, name: str) -> None:
    path = shared / "instruct" / name
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data")
    for file in find_files(str(path))[:3]:
        rows = [
            row for _, row in zip(range(50), (r for _, r in read_rows(file)), strict=False) if isinstance(row, dict)
        ]
        told = format_of_rows(rows, Reading())
        assert told == REAL[name]
        if told is None:
            continue
        items = [item for row in rows for item in read_row(row, HERE, Reading(of_file=told))]
        kept = [i for i in items if isinstance(i, (Conversation, Document, Pair))]
        assert len(kept) > 0.9 * len(items)


def test_columns_filters_roles_and_system_of_a_source() -> None:
    from educe.data.reading import Expression

    columns = {"messages": Expression("turns[].{role: who, content: text}", "columns.messages")}
    reading = Reading(
        columns=columns, where=Expression("lang == 'en'", "where"), roles={"bot": "assistant"}, system="Be brief."
    )
    row = {"lang": "en", "turns": [{"who": "user", "text": "a"}, {"who": "bot", "text": "b"}]}
    (made,) = read_row(row, HERE, reading)
    assert isinstance(made, Conversation)
    assert [(m.role, m.content) for m in made.messages] == [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    (left,) = read_row({**row, "lang": "de"}, HERE, reading)
    assert isinstance(left, Refusal)
    assert left.code == "E-DATA-202"


@pytest.mark.parametrize("form", ["messages", "prompt/completion", "alpaca", "prompt/response", "question/answer"])
def test_what_stands_beside_the_turns_is_read_for_every_format(form: str) -> None:
    """A system prompt, tools and a weight mean the same whatever the format."""
    turns = {
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "prompt/completion": {"prompt": "a", "completion": "b"}, "alpaca": {"instruction": "a", "output": "b"},
        "prompt/response": {"prompt": "a", "response": "b"}, "question/answer": {"question": "a", "answer": "b"},
    }[form]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f"}}]
    (made,) = read_row({**turns, "system": "s", "tools": tools, "weight": 0.5}, HERE)
    assert isinstance(made, Conversation)
    assert [(m.role, m.content, m.weight) for m in made.messages] == [
        ("system", "s", None), ("user", "a", None), ("assistant", "b", 0.5)
    ]  # fmt: skip
    assert [t["function"]["name"] for t in made.tools] == ["f"]
