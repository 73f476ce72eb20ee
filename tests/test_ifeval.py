"""IFEval: our verdicts against the official ones, row by row; each verifier's examples; what is refused; the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from educe.errors import EvalError
from educe.evaluate.ifeval.examples import EXAMPLES
from educe.evaluate.ifeval.grading import grade, variants
from educe.evaluate.ifeval.prompts import Instruction, Task, read_tasks
from educe.evaluate.ifeval.verifiers import VERIFIERS
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("langdetect")
pytest.importorskip("nltk")

# Official verdicts that ours differ from: (key, type, strict or loose, official): why.
EXPLAINED = {
    (
        "1122",
        "keywords:letter_frequency",
        "loose",
        False,
    ): "The prompt asks for 4 times '#', and 4 are there. The official program of 2023 took a letter that is none for a missing "
    "argument and drew one at random, another each time: strict passed by chance, loose failed by chance.",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def official(shared: Path) -> Path:
    return shared / "eval" / "ifeval"


def test_verdicts_equal_the_official_ones(official: Path) -> None:
    """270 stored responses of GPT-4 with 418 instructions, strict and loose: 836 verdicts."""
    by_prompt = {t.prompt: t for t in read_tasks(official / "input_data.jsonl")}
    verdicts = {form: lines(official / f"verdicts_{form}.jsonl") for form in ("strict", "loose")}
    differing, num = set(), 0
    for k, row in enumerate(lines(official / "responses_gpt4.jsonl")):
        task = by_prompt[row["prompt"]]
        graded = grade(task, row["response"])
        for form, ours in (("strict", graded.strict), ("loose", graded.loose)):
            theirs = verdicts[form][k]
            assert theirs["prompt"] == row["prompt"]
            assert theirs["instruction_id_list"] == [i.kind for i in task.instructions]
            for i, a, b in zip(task.instructions, ours, theirs["follow_instruction_list"], strict=True):
                num += 1
                if a != b:
                    differing.add((task.key, i.kind, form, b))
    assert num == 836
    assert differing == EXPLAINED.keys()


def test_all_prompts_are_read(official: Path) -> None:
    """Of the 541 the file here lacks key 2785."""
    tasks = read_tasks(official / "input_data.jsonl")
    assert len(tasks) == len({t.key for t in tasks}) == 540
    assert {i.kind for t in tasks for i in t.instructions} == VERIFIERS.keys() == EXAMPLES.keys()
    assert [t.as_json() for t in tasks] == [{**r, "key": str(r["key"])} for r in lines(official / "input_data.jsonl")]


def test_words_of_the_prompts_are_no_regular_expressions(official: Path) -> None:
    """So that taking them literally is the official verdict."""
    for task in read_tasks(official / "input_data.jsonl"):
        for i in task.instructions:
            given = [v for n, v in i.arguments.items() if n in ("keyword", "section_spliter")]
            given += [w for n, v in i.arguments.items() if n in ("keywords", "forbidden_words") for w in v]
            assert not any(set(r"\.^$*+?{}[]()|") & set(w) for w in given)


@pytest.mark.parametrize("kind", VERIFIERS)
def test_examples(kind: str) -> None:
    shown = EXAMPLES[kind]
    i = Instruction(kind=kind, arguments=shown.arguments)
    assert i.followed_by(shown.follows)
    assert not i.followed_by(shown.fails)
    assert not i.followed_by(shown.near)
    assert not i.followed_by(" \n")


@pytest.mark.parametrize("kind", VERIFIERS)
def test_a_missing_argument_is_an_error(kind: str) -> None:
    arguments = EXAMPLES[kind].arguments
    for name in arguments:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            Instruction(kind=kind, arguments={n: v for n, v in arguments.items() if n != name})
        with pytest.raises(ValueError, match=name):
            Instruction(kind=kind, arguments={**arguments, name: None})
    with pytest.raises(ValueError, match="tone is not an argument"):
        Instruction(kind=kind, arguments={**arguments, "tone": "kind"})


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not one of the 25"):
        Instruction(kind="punctuation:no_commas", arguments={})


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("length_constraints:number_words", "num_words", -1),
        ("length_constraints:number_words", "num_words", True),
        ("length_constraints:number_words", "num_words", "300"),
        ("length_constraints:number_words", "relation", "at most"),
        ("length_constraints:nth_paragraph_first_word", "nth_paragraph", 0),
        ("keywords:existence", "keywords", []),
        ("keywords:existence", "keywords", "oak"),
        ("keywords:letter_frequency", "letter", "qu"),
        ("startend:end_checker", "end_phrase", " "),
    ],
)
def test_arguments_of_a_wrong_form_are_errors(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Instruction(kind=kind, arguments={**EXAMPLES[kind].arguments, name: value})


GOOD = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}


@pytest.mark.parametrize(
    "change, found",
    [
        ({"prompt": None}, "prompt or key"),
        ({"kwargs": []}, "same length"),
        ({"kwargs": [None]}, "same length"),
        ({"instruction_id_list": ["punctuation:none"]}, "is not one of"),
        ({"instruction_id_list": ["length_constraints:number_words"]}, "num_words is missing"),
    ],
)
def test_a_wrong_prompt_is_told_with_its_line(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (GOOD, {**GOOD, "key": 2, **change})), encoding="utf-8")
    with pytest.raises(EvalError, match=found) as e:
        read_tasks(file)
    assert (e.value.code, e.value.where) == ("E-EVAL-101", f"{file}:2")


@pytest.mark.parametrize("text, found", [("", "no prompts"), ("{", "not JSON"), (f"{json.dumps(GOOD)}\n" * 2, "twice")])
def test_a_file_that_is_none_is_told(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(EvalError, match=found):
        read_tasks(file)
    with pytest.raises(EvalError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")


TASK = Task(
    key="all",
    prompt="",
    instructions=tuple(Instruction(kind=k, arguments=s.arguments) for k, s in EXAMPLES.items()),
)
bits = st.sampled_from(
    [
        "*",
        "**",
        "***",
        "******",
        "\n",
        "\n\n",
        '"',
        ",",
        "- ",
        "Oak",
        "BEECH",
        "[x]",
        "<<T>>",
        "P.S. ",
        "Section 1",
        "{}",
        ". ",
    ]
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.one_of(bits, st.text(max_size=5)), max_size=12).map("".join))
def test_loose_passes_whenever_strict_does(answer: str) -> None:
    graded = grade(TASK, answer)
    assert all(loose or not strict for strict, loose in zip(graded.strict, graded.loose, strict=True))
    assert grade(TASK, answer) == graded
    assert 1 <= len(variants(answer)) <= 8


def test_variants_are_the_official_eight() -> None:
    assert variants("Sure!\n*oak*\nBye") == [
        "Sure!\n*oak*\nBye", "Sure!\noak\nBye", "*oak*\nBye", "oak\nBye", "Sure!\n*oak*", "Sure!\noak", "*oak*", "oak",
    ]  # fmt: skip


def test_loose_forgives_a_remark_and_asterisks() -> None:
    task = Task(key="1", prompt="", instructions=(Instruction(kind="startend:quotation", arguments={}),))
    for answer in ('Here it is:\n"Oak."', '"Oak."\nAnything else?', '**"Oak."**'):
        assert grade(task, answer).strict == (False,)
        assert grade(task, answer).loose == (True,)
