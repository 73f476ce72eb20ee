"""Multiple choice: log-probabilities equal plain transformers' row by row; what is read, split, ranked and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config import parse_recipe  # noqa: E402
from educe.errors import EvalError  # noqa: E402
from educe.evaluate.choices import BY, Item, Scored, lines_of, option_of, read_items, score_options  # noqa: E402
from educe.model.blended import read_packed  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes.choices import scores_of  # noqa: E402

FILES = ("arc_easy", "openbook_qa", "piqa", "winogrande")
CACHED = Path("~/.cache/educe/models/HuggingFaceTB--SmolLM2-135M-Instruct--b179c9523d0e").expanduser()
OWN = parse_recipe("name: a\nmodel: m\ndata: {train: t.jsonl}\n", "r.yaml").template
PLAIN = parse_recipe("name: a\nmodel: m\ndata: {train: t.jsonl}\ntemplate: plain\n", "r.yaml").template


def cpu() -> Device:
    return Device(kind="cpu", dtype="float32", flops=1e9, why="", name="cpu")


def by_transformers(directory: Path, items: list[Item]) -> list[list[tuple[float, int]]]:
    """Each text alone, as plain as can be: ids of the Hub's tokenizer, logits of the model, the option's log-probabilities summed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for item in items:
        options = []
        for context, option in item.texts:
            stem = context.rstrip()
            before = tokenizer(stem, add_special_tokens=False).input_ids
            joint = context[len(stem) :] or " "
            whole = tokenizer(stem + joint + option, add_special_tokens=False).input_ids
            assert whole[: len(before)] == before
            with torch.no_grad():
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            at = range(len(before), len(whole))
            options.append((sum(float(log_p[i - 1, whole[i]]) for i in at), len(at)))
        found.append(options)
    return found


def compared(directory: Path, tokenizer: ChatTokenizer, items: list[Item]) -> None:
    model = load_model(directory, cpu())
    read_packed(model, True)
    packed = score_options(model, items, tokenizer, 1024)
    for item, mine, theirs in zip(items, packed, by_transformers(directory, items), strict=True):
        assert [s.num_tokens for s in mine] == [n for _, n in theirs]
        assert [s.log_p for s in mine] == pytest.approx([p for p, _ in theirs], abs=2e-3), item.row
        best = max(range(len(theirs)), key=lambda k: theirs[k][0])
        ranked = sorted((p for p, _ in theirs), reverse=True)
        if ranked[0] - ranked[1] > 5e-3:
            assert lines_of([item], [mine])[0]["chosen"]["sum"] == best


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_log_probabilities_are_those_of_transformers(shared: Path, name: str) -> None:
    if not CACHED.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct in the cache")
    items = read_items(shared / "eval" / "multiple_choice" / f"{name}.jsonl")[:75]
    compared(CACHED, load_tokenizer(CACHED, OWN), items)


def test_a_few_questions_on_a_tiny_model(shared: Path, tiny_model: Path) -> None:
    files = (shared / "eval" / "multiple_choice" / f"{name}.jsonl" for name in ("openbook_qa", "winogrande"))
    compared(tiny_model, load_tokenizer(tiny_model, PLAIN), [item for file in files for item in read_items(file)[:3]])


def test_all_published_files_are_read(shared: Path) -> None:
    sizes = {n: len(read_items(shared / "eval" / "multiple_choice" / f"{n}.jsonl")) for n in (*FILES, "boolq")}
    assert sizes == {"arc_easy": 2376, "openbook_qa": 500, "piqa": 1838, "winogrande": 1267, "boolq": 3270}


@pytest.mark.parametrize(
    "context,option",
    [
        ("Predators eat", "bunnies"),
        ("Question: dresser\n", "é 漢字"),
        ("", "alone"),
        ("ends in a space ", "x"),
        ("a\n\n", " b"),
    ],
)
def test_context_and_option_are_one_text(smollm2_tokenizer_dir: Path, context: str, option: str) -> None:
    tokenizer = load_tokenizer(smollm2_tokenizer_dir, OWN)
    made = option_of(context, option, tokenizer)
    between = "" if not context or context[-1].isspace() else " "
    text = tokenizer.decode(made.ids_T.tolist())
    assert text.endswith(context + between + option)
    scored = tokenizer.decode(made.ids_T[made.weights_T > 0].tolist())
    assert scored.endswith(option)
    assert scored.strip() == option.strip()
    assert made.weights_T[0] == 0


def test_rules_rank_by_sum_by_tokens_and_by_bytes() -> None:
    """Three options, each the best under another rule."""
    options = [Scored(log_p=-4.0, num_tokens=1, num_bytes=2), Scored(log_p=-6.0, num_tokens=6, num_bytes=5),
               Scored(log_p=-8.0, num_tokens=4, num_bytes=40)]  # fmt: skip
    item = Item(row="f:1", texts=(("c", "a"), ("c", "b"), ("c", "d")), gold=2)
    (line,) = lines_of([item], [options])
    assert line["chosen"] == {"sum": 0, "per_token": 1, "per_byte": 2}
    assert line["correct"] == {"sum": False, "per_token": False, "per_byte": True}


def test_accuracies_have_intervals_and_a_paired_test() -> None:
    def lines(right: int) -> list[dict[str, Any]]:
        return [{"correct": dict.fromkeys(BY, i < right)} for i in range(20)]

    found = scores_of({"untouched": lines(5), "tuned": lines(15)}, {"untouched": 1.0, "tuned": 2.0})
    assert found["systems"]["tuned"]["sum"]["value"] == 0.75
    assert found["systems"]["tuned"]["sum"]["low"] < 0.75 < found["systems"]["tuned"]["sum"]["high"]
    assert [(c["measure"], c["won"], c["lost"]) for c in found["comparisons"]] == [(by, 10, 0) for by in BY]


def test_lines_end_where_those_of_data_do(tmp_path: Path) -> None:
    """A line separator in a string is text, a byte order mark is none."""
    row = {"query": "q\u2028r\x85", "choices": ["a", "b"], "gold": 1}
    file = tmp_path / "q.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join([json.dumps(row, ensure_ascii=False)] * 2).encode())
    assert [(i.row, i.texts[0]) for i in read_items(file)] == [(f"q.jsonl:{k}", (row["query"], "a")) for k in (1, 3)]
    file.write_bytes(file.read_bytes() + b"\n\xff")
    with pytest.raises(EvalError, match=r"E-EVAL-003 q\.jsonl:4"):
        read_items(file)


@pytest.mark.parametrize(
    "row",
    ["no json", "[]", '{"query": "q", "choices": ["a"], "gold": 0}', '{"query": "q", "choices": ["a", "b"], "gold": 2}',
     '{"query": "q", "choices": ["a", "b"], "gold": true}', '{"query": "q", "choices": ["a", ""], "gold": 0}',
     '{"query": 1, "choices": ["a", "b"], "gold": 0}', '{"context_options": "ab", "continuation": "c", "gold": 0}'],
)  # fmt: skip
def test_what_is_no_question_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 1}) + f"\n{row}\n")
    with pytest.raises(EvalError, match=r"E-EVAL-003 q\.jsonl:2 "):
        read_items(file)
