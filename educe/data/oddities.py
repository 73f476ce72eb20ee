"""What looks wrong in rows that can be read: answers unlike the task's others, text that was left over from somewhere else.

Nothing is edited or refused for it: inconsistent answers make an inconsistent model, so they are shown. One pass; of each finding
the number and the first places are kept.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from educe.errors import Refusal
from educe.files.jsonl import parse_json
from educe.stats import percentile
from educe.types import Conversation

# A form that fewer answers share is none; with fewer answers there is nothing to say.
SHARED, MIN_ANSWERS = 0.8, 20
NUM_PLACES = 5
_MOST_VALUES = 5000
_LABEL_CHARS = 60
# An answer so much longer than what 95 % have at most is told, if it is longer than so many characters.
MUCH_LONGER, MANY_CHARS, _MOST_LONG = 8, 400, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """`count` of `of` answers or rows are odd in one way: `what` is odd, at `places` first, and `advice` what to do about it."""

    what: str
    count: int
    of: int
    places: tuple[str, ...]
    advice: str


# --- signs in one text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sign:
    what: str
    found: Callable[[str], object]
    advice: str
    answers_only: bool = False


_MARKERS = (
    r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|^### ?(?:Instruction|Response|Input|Assistant|Human):?"
    r"|</?s>|<｜[^｜\n]{1,40}｜>|^(?:Human|Assistant|USER|ASSISTANT): "
)
_REFUSES = re.compile(
    r"\A\W{0,3}(?:I'?m sorry,? (?:but )?I|I am sorry,? (?:but )?I|Sorry,? (?:but )?I (?:can|am)|"
    r"I (?:cannot|can'?t|am unable to|am not able to) (?:help|assist|provide|fulfil|answer|complete))"
)
_AS_AI = re.compile(r"\b[Aa]s an AI(?: language)?(?: model| assistant)?\b|\bI'?m just an AI\b")


def _refuses(answer: str) -> bool:
    return bool(_REFUSES.match(answer)) or ("an AI" in answer and bool(_AS_AI.search(answer)))


def _repeats(text: str) -> bool:
    """Few different words for many, or one sign again and again."""
    words = text.split()
    if len(words) >= 40 and len(set(words)) * 12 < len(words):
        return True
    return any(len(w) >= 200 and len(set(w)) <= 3 for w in words)


_SIGNS = (
    _Sign("rows with markers of a chat template in the text", re.compile(_MARKERS, re.M).search, "Remove them."),
    _Sign(
        "rows with placeholders that nobody filled in",
        re.compile(
            r"\{\{ *[A-Za-z_][\w .]{0,40}\}\}|\[(?:INSERT|YOUR|NAME|DATE|TODO)\b[^\]\n]{0,40}\]|\blorem ipsum\b"
        ).search,
        "Fill them in, or remove the rows.",
    ),
    _Sign(
        "answers that refuse or speak of being an AI",
        _refuses,
        "Keep them only if the model is to refuse.",
        answers_only=True,
    ),
    _Sign(
        "answers that are error messages",
        re.compile(
            r"\A(?:Error|Traceback|HTTP [45]\d\d|Rate limit|Internal Server Error|Request timed out)\b", re.I
        ).match,
        "Remove the rows.",
        answers_only=True,
    ),
    _Sign(
        "rows with characters that were decoded wrongly",
        re.compile("\ufffd|Ã[\u0080-\u00bf©¨¤¶¼]|â€[™œ\u009d“”]|Â[\u00a0°£]").search,
        "Convert the source again.",
    ),
    _Sign(
        "rows with invisible characters (tags, direction marks)",
        re.compile("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]").search,
        "Remove them.",
    ),
    _Sign(
        "rows with what looks like a secret, a key or a token",
        re.compile(
            r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|hf_[A-Za-z0-9]{30,}|xox[bp]-[\w-]{20,})"
            r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
        ).search,
        "Remove it: what is trained can be asked for.",
    ),
    _Sign("rows with a word or sign repeated again and again", _repeats, "Shorten it."),
)


def _unclosed(answer: str) -> bool:
    """Whether an answer ends in the middle: an open code fence, or a word that something follows."""
    if answer.count("```") % 2:
        return True
    last = answer.rstrip()[-24:]
    return bool(re.search(r"(?:[,;(\[{]|\b(?:and|or|the|a|an|of|to|with|for|that|which|is|are|because))\Z", last))


# --- features that answers of a task share -------------------------------------------------------------------------------


def _json_form(answer: str) -> str:
    start = answer.lstrip()[:1]
    value = parse_json(answer, "") if start in ("{", "[") else None
    if value is None or isinstance(value, Refusal):
        return "no JSON"
    if isinstance(value, dict):
        keys = ", ".join(f"{k}: {_kind(v)}" for k, v in sorted(value.items())[:20])
        return f"JSON {{{keys}}}"
    return "a JSON list"


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _label(answer: str) -> str:
    return answer if len(answer) <= _LABEL_CHARS else ""


def _prefix(answer: str) -> str:
    """What stands before the first colon of the first line."""
    head = answer.lstrip()[:_LABEL_CHARS].split("\n")[0]
    return f"{head.split(':')[0]}:" if ":" in head and len(head.split(":")[0].split()) <= 4 else "no such beginning"


_MARKDOWN = re.compile(r"^(?:#{1,6} |[-*] |\d+\. |> |```)|\*\*[^*\n]+\*\*|^\|.*\|$", re.M)


def _markdown(answer: str) -> str:
    return "Markdown" if _MARKDOWN.search(answer) else "plain text"


_ASCII_LETTER = re.compile("[A-Za-z]")


def _script(answer: str) -> str:
    """The writing system of most letters (of the first 400 characters)."""
    head = answer[:400]
    letters = [c for c in head if c.isalpha()] if not head.isascii() else []
    if not (letters or _ASCII_LETTER.search(head)):
        return "no letters"
    if all(c < "\u0250" for c in letters):
        return "LATIN"
    return Counter(unicodedata.name(c, "other").split()[0] for c in letters).most_common(1)[0][0]


_FEATURES: Mapping[str, Callable[[str], str]] = {
    "form": _json_form,
    "beginning": _prefix,
    "layout": _markdown,
    "script": _script,
}


# --- one task ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """How often each value was seen, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, value: str, place: str) -> None:
        if value not in self.counts and len(self.counts) >= _MOST_VALUES:
            value = "other values"
        self.counts[value] += 1
        seen = self.places.setdefault(value, [])
        if len(seen) < NUM_PLACES:
            seen.append(place)


class Oddities:
    """Collects what is odd in the rows of one task."""

    def __init__(self) -> None:
        self.rows = self.answers = 0
        self._signs, self._labels = _Tally(), _Tally()
        self._features = {name: _Tally() for name in _FEATURES}
        self._lengths = array("I")
        self._long: list[tuple[int, str]] = []

    def add(self, c: Conversation) -> None:
        """Look at a row; of its answers the last one counts for the form."""
        self.rows += 1
        place = str(c.source)
        answers = [m.content for m in c.messages if m.role == "assistant" and m.content]
        everything = "\n".join([m.content for m in c.messages])
        said = "\n\n".join(answers)
        for sign in _SIGNS:
            texts = answers if sign.answers_only else [everything]
            if any(sign.found(t) for t in texts):
                self._signs.add(sign.what, place)
        if not said:
            return
        self.answers += 1
        last = answers[-1]
        if _unclosed(last):
            self._signs.add(_CUT, place)
        for name, feature in _FEATURES.items():
            self._features[name].add(feature(last), place)
        self._labels.add(_label(last), place)
        self._lengths.append(len(last))
        if len(last) > MANY_CHARS:
            keep = heapq.heappush if len(self._long) < _MOST_LONG else heapq.heappushpop
            keep(self._long, (len(last), place))

    def found(self) -> list[Oddity]:
        """All that is odd, most frequent first."""
        odd = [*self._found_signs(), *self._found_labels()] if self.rows else []
        if self.answers >= MIN_ANSWERS and len(self._labels.counts) == 1 and "" not in self._labels.counts:
            (value,) = self._labels.counts
            what, places = f"answers are all the same: {value!r}", tuple(self._labels.places[value])
            odd.append(Oddity(what=what, count=self.answers, of=self.answers, places=places, advice="Is it right?"))
        if self.answers >= MIN_ANSWERS:
            for name, tally in self._features.items():
                odd += _unlike(name, tally, self.answers)
            odd += self._found_lengths()
        return sorted(odd, key=lambda o: -o.count)

    @property
    def form(self) -> str:
        """What most answers have in common, in words."""
        if self.answers < MIN_ANSWERS:
            return ""
        said = [v for v in (_common(t, self.answers) for t in self._features.values()) if v and not v.startswith("no ")]
        if labels := self._label_set():
            said = [f"one of {len(labels)} labels"]
        return ", ".join(said)

    def _found_signs(self) -> Iterator[Oddity]:
        advice = {s.what: s.advice for s in _SIGNS} | {_CUT: "Complete them, or remove the rows."}
        for what, count in self._signs.counts.items():
            if what == _CUT and count > _OFTEN * self.answers:
                continue  # the task's way: code, completions of sentences
            places = tuple(self._signs.places[what])
            yield Oddity(what=what, count=count, of=self.rows, places=places, advice=advice[what])

    def _found_lengths(self) -> Iterator[Oddity]:
        usual = percentile(self._lengths.tolist(), 0.95)
        number = sum(n > max(MUCH_LONGER * usual, MANY_CHARS) for n in self._lengths)
        long = sorted(((n, place) for n, place in self._long if n > MUCH_LONGER * usual), reverse=True)
        if number:
            what = f"answers of more than {MUCH_LONGER * usual:,} characters, where 95 % have at most {usual:,}"
            places = tuple(place for _, place in long[:NUM_PLACES])
            yield Oddity(what=what, count=number, of=self.answers, places=places, advice="Shorten or remove them.")

    def _label_set(self) -> list[str]:
        """Labels, where nearly all answers are one of a few short ones; else none."""
        counts = self._labels.counts
        short = self.answers - counts[""]
        labels = [v for v, n in counts.items() if v and n >= max(2, 0.01 * self.answers)]
        few = 2 <= len(labels) <= max(2, self.answers // 20)
        known = sum(counts[v] for v in labels)
        return labels if self.answers >= MIN_ANSWERS and few and known >= SHARED * max(short, self.answers) else []

    def _found_labels(self) -> Iterator[Oddity]:
        labels = self._label_set()
        if not labels:
            return
        folded = {v.casefold().strip(" .\n"): v for v in labels}
        for value, count in self._labels.counts.items():
            if value in labels:
                continue
            like = folded.get(value.casefold().strip(" .\n"))
            shown = f"{value!r}" if value else "a long answer"
            what = f"answers {shown} where the others are one of {len(labels)} labels"
            advice = f"Write it like the others: {like!r}." if like else "Is it right?"
            yield Oddity(
                what=what, count=count, of=self.answers, places=tuple(self._labels.places[value]), advice=advice
            )


_CUT, _OFTEN = "answers that end in the middle", 0.05


def _common(tally: _Tally, total: int) -> str:
    """The value that most answers share; "" where there is none."""
    value, count = tally.counts.most_common(1)[0]
    return value if count >= SHARED * total else ""


def _unlike(name: str, tally: _Tally, total: int) -> Iterator[Oddity]:
    """Answers whose value is not the one that most share, the `_MOST_UNLIKE` most frequent ones."""
    common = _common(tally, total)
    if not common or common in _NOTHING or (common == "plain text" and tally.counts[common] < 0.95 * total):
        return
    others = [(v, n) for v, n in tally.counts.most_common() if v != common and v not in _NO_MATTER]
    for value, count in others[:_MOST_UNLIKE]:
        what = f"answers of another {name}: {value}, where {tally.counts[common]:,} of {total:,} are {common}"
        yield Oddity(what=what, count=count, of=total, places=tuple(tally.places[value]), advice="Make them alike.")


_NOTHING = frozenset({"no JSON", "no such beginning"})  # what says nothing if most share it
_NO_MATTER = frozenset({"no letters"})  # what says nothing of a single answer
_MOST_UNLIKE = 6
