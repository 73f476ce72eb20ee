"""What was forgotten: general questions graded, manners counted, the base model remembered, answers read again by it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from educe.chat.tokens import load_tokenizer  # noqa: E402
from educe.chat.turns import Row, find_turn  # noqa: E402
from educe.errors import UsageError  # noqa: E402
from educe.evaluate.drift import Texts  # noqa: E402
from educe.evaluate.forgetting import Said, as_scores, flags, prompt_change, text_change  # noqa: E402
from educe.evaluate.general import own_passages  # noqa: E402
from educe.evaluate.general_prompts import CHECKS, GeneralPrompt, is_right, own_prompts  # noqa: E402
from educe.evaluate.manner import manners  # noqa: E402
from educe.evaluate.shift import MARGINAL, Asked, Place, base_ranks, by_position, shift_record  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.blended import read_packed  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.recipes import both  # noqa: E402
from educe.recipes.effect import rows_within  # noqa: E402
from educe.recipes.forgetting import heard  # noqa: E402
from educe.recipes.run import Run, train  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.types import Answer, Conversation, Message, Source  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from small_runs import recipe, small_place  # noqa: E402
from test_adapters import cpu  # noqa: E402
from test_blend import examples  # noqa: E402
from test_chat_templates import own_tokenizer  # noqa: E402

# General questions

ANSWERS = [
    # checks, right, wrong, near miss
    ({"says": ["42"]}, "17 + 25 = 42.", "It is 41.", "It is 420."),
    ({"says": ["42"]}, "42", "4", "3.42"),
    ({"says": ["36"]}, "There are 36 eggs", "", "1,236"),
    ({"says": ["0.7"], "not": ["0.65 is larger"]}, "0.7 is larger", "0.75", "0.65 is larger than 0.7"),
    ({"says": ["H2O"]}, "It is h₂o!", "HO2", "H2O2"),
    ({"is": ["63"]}, " 63. ", "64", "9 * 7 = 63"),
    ({"is": ["yes"]}, "Yes!", "no", "yes and no"),
    ({"is": ["TABLE"], "case": True}, '"TABLE"', "CHAIR", "Table"),
    ({"json": {"ok": True}}, ' {"ok":true}', "ok", '```json\n{"ok": true}\n```'),
    ({"lines": 3}, "apple\npear\n\nplum", "apple", "Here are three:\n- apple\n- pear"),
    ({"words": 1}, "Blue", "I like blue", "Dark blue"),
    ({"refuses": True}, "I'm sorry, I can’t help with that.", "Sure! First,", "First, take a can; not a cup"),
    ({"refuses": False}, "Spray the leaves with milk.", "I cannot help with killing.", "Sorry, no."),
]


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "GLM-4.6", "openai-gpt-oss-120b"])
def test_what_the_template_opens_an_answer_with_is_not_graded(
    shared: Path, tiny_tokenizer_dir: Path, tmp_path: Path, name: str
) -> None:
    source = (shared / "templates" / "models" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = own_tokenizer(source, tiny_tokenizer_dir, tmp_path)
    user = Message(role="user", content="9 * 7? Answer with the number alone.")
    row = Conversation(messages=(user, Message(role="assistant", content="63")), source=Source(file="x", line=1))
    opening = "".join(p.text for p in find_turn(Row(row, tokenizer), 1).completion).partition("63")[0]
    assert opening.strip()
    prompt = GeneralPrompt(key="x", kind="x", messages=(user,), checks={"is": ["63"]})
    said = [Answer(text=t, num_tokens=9, stopped=True) for t in (f"{opening}63", f"{opening}64", "63")]
    found = heard([prompt] * 3, said, tokenizer)
    assert [is_right(prompt, a.text) for a in found] == [True, False, True]


@pytest.mark.parametrize("checks,right,wrong,near", ANSWERS)
def test_each_check_passes_fails_and_sees_the_near_miss(checks: Any, right: str, wrong: str, near: str) -> None:
    prompt = GeneralPrompt(key="x", kind="x", messages=(), checks=checks)
    assert [is_right(prompt, text) for text in (right, wrong, near)] == [True, False, False]
    assert {name for checks, *_ in ANSWERS for name in checks} - {"case"} == set(CHECKS)


def test_every_question_of_the_package_can_be_answered_right_and_wrong() -> None:
    prompts = own_prompts()
    assert len(prompts) == len({p.key for p in prompts}) == 46
    assert len({p.kind for p in prompts}) == 9
    for p in prompts:
        c = p.checks
        texts = {"lines": "a\n" * c.get("lines", 0), "words": "blue", "json": json.dumps(c.get("json"))}
        refusal = "I cannot help with that." if c.get("refuses") else "With water."
        good = (c.get("says") or c.get("is") or [next((t for n, t in texts.items() if n in c), refusal)])[0]
        assert is_right(p, good), p
        assert not is_right(p, ""), p
        assert not is_right(p, "Perhaps it is sensible to ask my grandmother in Wales, or not."), p
        assert p.messages[-1].role == "user"


# Manners


def answer(text: str, stopped: bool = True) -> dict[str, Any]:
    return {"answer": text, "stopped": stopped}


def test_manners_are_counted() -> None:
    found = manners({"a": [answer("x y x y x y x y"), answer(""), answer("z", stopped=False), answer("x")]})["a"]
    assert (found.empty, found.endless, found.words, found.counted) == (0.25, 0.25, 2.5, 10)
    assert (found.distinct_1, found.distinct_2, found.repeated) == (3 / 10, 2 / 7, 3 / 5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text("ab .\n"), st.booleans()), min_size=1, max_size=6), st.text("abc ", max_size=30))
def test_manners_are_shares_over_as_many_words_of_each(said: list[tuple[str, bool]], other: str) -> None:
    found = manners({"one": [answer(t, s) for t, s in said], "two": [answer(other)]})
    for m in found.values():
        shares = (m.empty, m.endless, m.distinct_1, m.distinct_2, m.repeated)
        assert all(s is None or 0 <= s <= 1 for s in shares)
    counted = {m.counted for m in found.values()} - {0}
    assert len(counted) <= 1


# The base model, remembered


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> CausalLM:
    model = load_model(tiny_model, cpu())
    read_packed(model, packs=True)
    return model


def test_what_was_written_is_remembered_to_the_bit(tiny_model: Path, base: CausalLM, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = load_model(tiny_model, cpu())
    read_packed(other, packs=True)
    with torch.no_grad():
        for p in other.network.parameters():
            p += 0.02 * torch.randn(p.shape)
    first, second = (Texts(examples(6), [0, 0, 1, 2, 3, 3], 64) for _ in range(2))
    assert first.key == second.key != Texts(examples(5), [0, 0, 1, 2, 3], 64).key
    first.remember(base)
    first.write(tmp_path / "base.safetensors")
    assert second.read(tmp_path / "base.safetensors")
    assert second.drift(other) == first.drift(other)
    assert second.base_nll_R == pytest.approx(first.drift(base).nll_R, rel=1e-6)
    assert first.nll(base) == pytest.approx(first.base_nll_R, rel=1e-6)
    # Absent, damaged, or of other rows: asked again, never trusted.
    fresh = Texts(examples(6), [0, 0, 1, 2, 3, 3], 64)
    assert not fresh.read(tmp_path / "absent")
    assert not Texts(examples(5), [0, 0, 1, 2, 3], 64).read(tmp_path / "base.safetensors")
    (tmp_path / "base.safetensors").write_bytes(b"\x10" + bytes(30))
    assert not fresh.read(tmp_path / "base.safetensors")


# Flags


def said(right: int, total: int = 40, ended: bool = True) -> list[Said]:
    return [Said(right=i < right, ended=ended, empty=False, num_tokens=5) for i in range(total)]


def test_a_flag_needs_more_than_the_interval() -> None:
    rng = np.random.default_rng(0)
    before, sizes = rng.uniform(50, 100, 30), np.full(30, 100.0)
    kinds = ["a"] * 40
    same = text_change(before, before, np.zeros(30), sizes, 900, None)
    noisy = text_change(before, before + rng.normal(0, 5, 30), np.zeros(30), sizes, 900, None)
    worse = text_change(before, before * 1.05, np.ones(30), sizes, 900, None)
    steady = prompt_change(kinds, said(20), said(19), 0.1)
    assert same.change.value == 0
    assert worse.kl == pytest.approx(30 / 900)
    assert flags(same, steady) == flags(noisy, steady) == []
    (told,) = flags(worse, steady)
    assert "5.0% more bits per byte" in told
    lost = prompt_change(kinds, said(30), said(10, ended=False), 0.1)
    assert [f.split(" of ")[0] for f in flags(same, lost)] == ["10", "40"]
    assert lost.kinds == {"a": (40, 30, 10)}
    better = prompt_change(kinds, said(10, ended=False), said(30), 0.1)
    assert flags(same, better) == []
    slight = text_change(before, before * 1.001, np.ones(30), sizes, 900, None)
    found = as_scores(slight, lost, None, 0)
    assert len(found["flags"]) == 3
    assert found["most"] == pytest.approx(1)  # no answer ends any more
    assert as_scores(slight, steady, None, 0)["most"] == pytest.approx(0.001)


def test_a_model_that_is_cut_before_it_answers_is_told() -> None:
    kinds = ["a"] * 40
    thinks = said(0, 36, ended=False) + said(0, 4)
    assert "ends 4 of its 40 answers" in prompt_change(kinds, thinks, said(30), 0.1).unfit
    assert prompt_change(kinds, said(5, 35, ended=False) + said(0, 5), said(30), 0.1).unfit == ""
    knows_nothing = prompt_change(kinds, said(4), said(1), 0.1).unfit
    assert "answers 4 of 40 right (1 after tuning): there is not much to lose" in knows_nothing


# The shift


def test_ranks_are_those_of_the_models_own_logits(base: CausalLM) -> None:
    rng = np.random.default_rng(3)
    asked = [Asked(prompt=tuple(rng.integers(5, 400, 7).tolist()), answer=tuple(rng.integers(5, 400, n).tolist()))
             for n in (4, 0, 9, 1)]  # fmt: skip
    for capacity in (1, 64):
        found = base_ranks(base, asked, capacity)
        assert [len(f) for f in found] == [4, 0, 9, 1]
        for a, places in zip(asked, found, strict=True):
            ids = torch.tensor([a.prompt + a.answer])
            with torch.no_grad():
                logits = base.network(input_ids=ids).logits[0].float()
            for k, p in enumerate(places):
                at = logits[len(a.prompt) + k - 1]
                assert p.token == a.answer[k]
                assert p.rank == int((at > at[p.token]).sum()) + 1
                assert p.first == int(at.argmax())


def test_the_base_models_own_answers_are_unshifted(tiny_model: Path, base: CausalLM) -> None:
    tokenizer = load_tokenizer(tiny_model)
    prompts = [tokenizer.encode_plain(text) for text in ("the cat", "order item said hello", "user")]
    answers = LocalSampler(base, tokenizer).answer(prompts, 12)
    assert all(len(a.ids) == a.num_tokens for a in answers)
    asked = [Asked(prompt=tuple(p), answer=a.ids) for p, a in zip(prompts, answers, strict=True)]
    found = shift_record(asked, base_ranks(base, asked, 64), str, frozenset(tokenizer.stop))
    assert found["counts"] == {"unshifted": sum(a.num_tokens for a in answers), "marginal": 0, "shifted": 0}
    assert found["most"] == []
    assert "none" in found["text"]


PLACE = st.builds(Place, token=st.integers(0, 9), rank=st.integers(1, 8), first=st.integers(0, 9))
PLACES = st.lists(st.lists(PLACE, max_size=40), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(PLACES)
def test_every_place_is_counted_once(places: list[list[Place]]) -> None:
    asked = [Asked(prompt=(1, 2), answer=tuple(p.token for p in row)) for row in places]
    found = shift_record(asked, places, str, frozenset({0}))
    total = sum(map(len, places))
    shifted = sum(p.rank > MARGINAL for row in places for p in row)
    assert sum(found["counts"].values()) == found["tokens"] == total
    assert sum(found["kinds"].values()) == found["counts"]["shifted"] == shifted
    ranges = by_position(places)
    assert sum(r["unshifted"] + r["marginal"] + r["shifted"] for r in ranges) == total
    assert all(a["last"] + 1 == b["first"] for a, b in itertools.pairwise(ranges))
    assert max((r["last"] for r in ranges), default=0) == max(map(len, places))
    assert sum(m["shifted"] for m in found["most"]) == shifted
    for r in ranges:
        of = r["unshifted"] + r["marginal"] + r["shifted"]
        assert r["share"] is None or r["share"]["value"] == pytest.approx(r["shifted"] / of)
    json.dumps(found)


def test_tokens_of_one_answer_shift_together() -> None:
    """Twenty answers of eight equal tokens, ten of them shifted throughout, are twenty observations, not 160."""
    shifted, kept = (Place(token=1, rank=r, first=2) for r in (9, 1))
    last = by_position([[shifted] * 8] * 10 + [[kept] * 8] * 10)[-1]
    assert (last["first"], last["last"]) == (5, 8)
    assert last["share"]["high"] - last["share"]["low"] == pytest.approx(
        2 * 0.21, abs=0.03
    )  # Wilson's of 20; of 80: 2 * 0.107


# A run


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=20), st.integers(1, 400), st.integers(0, 9))
def test_rows_whose_loss_is_measured_fit_their_room(sizes: list[int], room: int, seed: int) -> None:
    rows = rows_within(sizes, room, seed)
    assert rows == rows_within(sizes, room, seed)
    assert 2 <= len(rows) == len(set(rows))
    assert len(rows) == 2 or sum(sizes[i] for i in rows) <= room
    assert len(rows) == len(sizes) or sum(sizes[i] for i in rows) + max(sizes) > room


def test_rows_whose_loss_is_measured_are_not_the_first_of_the_file() -> None:
    drawn = [rows_within([100] * 1000, 6000, seed) for seed in range(3)]
    assert all(len(rows) == 60 and 350 < sum(rows) / 60 < 650 for rows in drawn)
    assert drawn[0] != drawn[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Run]:
    with small_place(tmp_path_factory, tiny_model) as place:
        path = recipe(place, "small", epochs=8)
        path.write_text(path.read_text().replace("few_shot: 0", "few_shot: 2"), encoding="utf-8")
        yield train(path)


def test_a_general_text_that_is_none_is_told_before_a_model_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both, "load_model", None)
    with pytest.raises(UsageError, match=r"none\.txt cannot be read"):
        run.eval(general=run.path / "none.txt")


def test_eval_says_what_was_forgotten_and_where_answers_shift(run: Run) -> None:
    lines: list[str] = []
    scores = run.eval(say=lines.append)
    general = scores["general"]
    assert general["text"]["passages"] == len(own_passages()) == 36
    assert general["text"]["kl"] > 0 < general["task"]["kl"]
    assert general["prompts"]["questions"] == 46 == len(read_jsonl(run.dir.general))
    assert general["flags"]  # a tiny random model that learned twelve rows by heart
    assert "Forgotten: " in scores["verdict"]
    assert scores["systems"]["tuned"]["manner"]["words"] > 0
    assert [c["before"] for c in scores["loss"]["comparisons"]] == ["untouched", "few_shot"]
    prompt = scores["systems"]["few_shot"]["prompt"]
    values = [t["value"] for t in prompt["tried"]]
    assert (prompt["by"], prompt["dev_rows"]) == ("loss", 12)
    assert min(values) == next(t["value"] for t in prompt["tried"] if t["label"] == prompt["label"])
    shift = json.loads(run.dir.shift.read_text())
    assert shift["answers"] == 3
    assert shift["counts"] == scores["shift"]["counts"]
    lines.clear()  # another test may have asked the same model the same
    again = run.eval(say=lines.append)
    known = [x for x in lines if "taken from the cache" in x]
    assert [x.partition(":")[0] for x in known] == [
        *("untouched", "untouched, best prompt", "untouched, general questions", "tuned", "tuned, general questions")
    ]
    for s in (scores, again):
        s["general"].pop("seconds")
        s["shift"].pop("seconds")
    assert again["general"] == general
    assert again["loss"] == scores["loss"]
    kept = run.eval(regrade=True)
    assert kept["verdict"] == again["verdict"]


def test_a_general_file_of_ones_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ours.txt").write_text("the cat sat on the mat\n\nhello to the user\n", encoding="utf-8")
    text = run.eval(general=tmp_path / "ours.txt")["general"]["text"]
    assert (text["file"], text["passages"], text["bytes"]) == ("ours.txt", 2, 39)
