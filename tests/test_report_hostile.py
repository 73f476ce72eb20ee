"""Text of every field of every file that the page reads stays text: forty attacks, and characters that hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from educe.report import build_report, reading
from educe.report.reading import read_run

from report_payloads import FILES, PAYLOADS, poisoned
from run_directory import Page, make_run


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """By how much is replaced."""
    return {
        how: Page(build_report(poisoned(tmp_path_factory.mktemp(how) / "run", "plain words", how)))
        for how in ("texts", "everything")
    }


def test_there_are_forty_payloads_and_every_file_is_among_those_that_are_poisoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = make_run(tmp_path), set[str]()
    opened = reading.opened

    def note(file: Path, read: Any, kept: Any) -> Any:
        seen.add(file.relative_to(run.path).as_posix())
        return opened(file, read, kept)

    monkeypatch.setattr(reading, "opened", note)
    read_run(run)
    assert seen == {name for name in FILES if not name.startswith(("judged/", "suites/", "shift"))}  # opened elsewhere
    assert len(PAYLOADS) == len(set(PAYLOADS)) == 40


# All forty with everything replaced: in Chromium (test_report_browser_deep.py).
CASES = [(p, "texts") for p in PAYLOADS] + [(p, "everything") for p in PAYLOADS[::5]]


@pytest.mark.parametrize("payload, how", CASES)
def test_text_never_becomes_markup(tmp_path: Path, payload: str, how: str, harmless: dict[str, Page]) -> None:
    """`texts`: all but the few words that are read as choices; `everything`: those, numbers, truths and keys too."""
    found = Page(build_report(poisoned(tmp_path, payload, how)))
    assert _elements(found) == _elements(harmless[how]), "data made or broke an element"
    assert not found.open
    assert not any(a.startswith("on") or a in ("src", "style") for _, names in found.shape for a in names)
    assert set(found.links) <= {f"#{i}" for i in found.ids}
    assert found.text.count(" ".join(payload.split())) > (60 if how == "texts" else 5), (
        "the payload must be seen, as text"
    )


def test_bidi_zero_width_and_control_characters_are_shown(tmp_path: Path) -> None:
    bad = "a\u202eb\u200bc\u0000d\u0007e\u00adf\u2028g\ufeffh\U000e0041i\u3164j"
    html = build_report(poisoned(tmp_path, bad, "texts"))
    for point in ("202E", "200B", "0000", "0007", "00AD", "2028", "FEFF", "E0041", "3164"):
        assert f"⟨U+{point}⟩" in html
    assert not set(html) & set(bad) - set("abcdefghij")
    assert not Page(html).open


def test_a_lone_surrogate_does_not_break_the_file(tmp_path: Path) -> None:
    html = build_report(poisoned(tmp_path, "half \ud83d a character", "texts"))
    assert "⟨U+D83D⟩" in html.encode("utf-8").decode()


def _elements(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    """All but the notes of how much of a long text is left out."""
    return [e for e in page.shape if e != ("span", ("class",))]
