"""scores.json → the verdict in words: was tuning worth it, would a prompt have done, what was forgotten, at what price?

The first sentence is the headline. It says no more than the paired tests allow: "do not tune" needs an interval that leaves no
room for a gain worth having, and where the rows cannot tell it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from educe.stats import FEWEST

ALPHA = 0.05
WORTH = (
    0.05  # a gain below this share of the rows (or of the mean score, or of the loss) is not worth a model of one's own
)
OWN = ("untouched", "few_shot", "tuned")

Case = Literal["better", "worse", "alike", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """The tuned model beside another system: `case` for the headline; its value, the test, and the differences that so few rows
    leave room for, in words."""

    case: Case
    value: str
    test: str
    room: str = ""


def verdict(found: Mapping[str, Any]) -> str:
    """Of all else that scores.json holds; `pairs` of it are those of a run that learned from pairs."""
    if found["metric"] == "text" and found.get("pairs"):
        return " ".join(filter(None, [_by_pairs(found["pairs"]), _forgotten(found), _price(found)]))
    told = _told(found)
    if "untouched" not in told.against:
        return _by_dev_loss(found) or "Nothing to compare yet."
    plain, prompt = told.against["untouched"], told.against.get("few_shot")
    said = [_headline(told, plain, prompt, found), f"Paired test: {plain.test}."]
    if plain.case == "open":
        said += [plain.room, "More test rows would show smaller differences."]
    if prompt is not None:
        said.append(f"{_reach(found)} {prompt.value}; the tuned one is {_than(prompt.case)} ({prompt.test}).")
    said += [_other(name, told, found) for name in told.against if name not in OWN]
    return " ".join(filter(None, [*said, _forgotten(found), _price(found)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What is compared: in words before → after, and each system against the tuned model."""

    change: str
    tuned: str
    against: dict[str, Against]


def _told(found: Mapping[str, Any]) -> _Told:
    if found["metric"] == "text":
        return _losses(found)
    systems, shares = found["systems"], found["measure"] == "share"

    def value(name: str) -> str:
        return f"{100 * systems[name]['value']:.0f} %" if shares else f"{systems[name]['value']:.2f}"

    against = {
        c["before"]: Against(
            case=_case(c["difference"], sure=c["p"] < ALPHA),
            value=value(c["before"]),
            test=chance(c["p"]),
            room=_room(c, found["num_rows"], shares=shares),
        )
        for c in found["comparisons"]
    }
    if "untouched" not in against:
        return _Told(change="", tuned="", against={})
    values = f"{value('untouched')} → {value('tuned')}"
    change = f"{values} of the test rows right" if shares else f"mean score {values}"
    return _Told(change=change, tuned=value("tuned"), against=against)


def _losses(found: Mapping[str, Any]) -> _Told:
    """Free text has many right answers: what is compared is how likely the expected ones are."""
    loss = found.get("loss")
    if not loss:
        return _Told(change="", tuned="", against={})
    values = {name: f"{nats:.2f}" for name, nats in loss["systems"].items()}
    measured, rows = loss["rows"], found["num_rows"]
    over = f"{measured} of {rows} rows" if measured < rows else f"all {rows} rows"
    against = {}
    for c in loss["comparisons"]:
        d = c["difference"]  # tuned - other, so that below 0 is better
        start = max(1e-9, loss["systems"][c["before"]])
        gain = {"value": -d["value"] / start, "low": -d["high"] / start, "high": -d["low"] / start}
        case = _case(gain, sure=not d["low"] <= 0 <= d["high"])
        test = f"over {over}, {d['value']:+.2f} nats, 95 % interval {d['low']:+.2f} to {d['high']:+.2f}"
        against[c["before"]] = Against(case=case, value=values[c["before"]], test=test)
    change = f"loss of the expected answers {values['untouched']} → {values['tuned']} nats per token"
    return _Told(change=change, tuned=values["tuned"], against=against)


def _room(c: Mapping[str, Any], rows: int, *, shares: bool) -> str:
    """Why a difference may have gone unseen, where too few rows changed for the paired test to show any."""
    changed, d = c["won"] + c["lost"], c["difference"]
    if changed >= FEWEST:
        return ""
    low, high = (f"{100 * d[k]:+.0f}" if shares else f"{d[k]:+.2f}" for k in ("low", "high"))
    num = "no row" if not changed else f"{changed} row{'s' if changed > 1 else ''}"
    return (
        f"{num.capitalize()} of {rows} changed, and the test needs {FEWEST} to show a difference: "
        f"anything from {low} to {high}{' points' if shares else ''} may have gone unseen."
    )


def _case(gain: Mapping[str, float], *, sure: bool) -> Case:
    if sure and gain["value"] != 0:
        return "better" if gain["value"] > 0 else "worse"
    return "alike" if gain["high"] <= WORTH else "open"


def _headline(told: _Told, plain: Against, prompt: Against | None, found: Mapping[str, Any]) -> str:
    forgot = ", and the model forgot" if _lost_much(found) else ""
    if plain.case == "worse":
        return f"Do not tune: it did harm, {told.change}."
    # A prompt is as good as tuning only where tuning is known to be good for something, or for nothing.
    if prompt is not None and (prompt.case == "worse" or (prompt.case == "alike" and plain.case != "open")):
        how = "better" if prompt.case == "worse" else "as well"
        return f"Do not tune: a prompt does {how}, {prompt.value} against {told.tuned}{forgot}."
    if plain.case == "alike":
        return f"Do not tune: the untouched model does as well, {told.change}{forgot}."
    if plain.case == "open":
        return f"No difference shown: {told.change}{forgot}."
    unsure = ", but not shown to beat a prompt" if prompt is not None and prompt.case != "better" else ""
    price = ", at a price" if forgot and not unsure else ""
    return f"Tuning helped{unsure}{price}: {told.change}{forgot}."


def _than(case: Case) -> str:
    return "better" if case == "better" else "worse" if case == "worse" else "not shown to be better"


def _reach(found: Mapping[str, Any]) -> str:
    prompt = found["systems"].get("few_shot", {}).get("prompt")
    if not prompt:
        return "With examples in its prompt the untouched model reaches"
    return f"With its best prompt ({prompt['label']}; {prompt['how']}) the untouched model reaches"


def _other(name: str, told: _Told, found: Mapping[str, Any]) -> str:
    """A sentence on a model that was asked beside."""
    system, against = found["systems"].get(name, {}), told.against[name]
    price = f" for {system['cost']:.2g} USD" if system.get("cost") is not None else ""
    return f"{system.get('label', name)} reaches {against.value}{price}; the tuned one is {_than(against.case)} ({against.test})."


def _lost_much(found: Mapping[str, Any]) -> bool:
    """Whether a flag tells of a change that is worth a headline."""
    general = found.get("general") or {}
    return bool(general) and bool(general["flags"]) and general["most"] >= WORTH


def _forgotten(found: Mapping[str, Any]) -> str:
    general = found.get("general")
    if not general:
        return "Whether it forgot is not known: these scores do not hold it, and `educe eval` measures it."
    text, prompts = general["text"], general["prompts"]
    unfit = prompts.get("unfit", "")
    if general["flags"]:
        little = "" if _lost_much(found) else ", but little"
        return f"Forgotten{little}: {'; '.join(filter(None, [*general['flags'], unfit]))}."
    change = text["change"]["value"] / text["before"]
    right = unfit or f"{prompts['right'][0]} → {prompts['right'][1]} of {prompts['questions']} general questions right"
    return f"Nothing is shown to be forgotten: general text {change:+.1%} bits per byte, {right}."


def _price(found: Mapping[str, Any]) -> str:
    """What tuning took, and what the prompt would take with every request."""
    said = []
    if found.get("training_s") is not None:
        said.append(f"{_time(found['training_s'])} of training")
    plain, prompted = (found["systems"].get(n, {}).get("prompt_tokens") for n in ("untouched", "few_shot"))
    if plain is not None and prompted is not None:
        said.append(f"{prompted - plain:+.0f} tokens with every request for the prompt")
    return f"Price: {' against '.join(said)}." if said else ""


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _by_pairs(pairs: Mapping[str, Any]) -> str:
    """Learned from pairs: no answer is the right one."""
    before, after = (f"{100 * share:.0f} %" for share in pairs["ranked"])
    moved = (
        f", KL from the stage's start {pairs['kl']:.2g} nats per token on chosen answers"
        if pairs["kl"] is not None
        else ""
    )
    return (
        f"{before} → {after} of the dev pairs ranked right (log-probability per token){moved}. Which answers are better is not "
        "graded: read them side by side, or let a model judge them (`educe judge`)."
    )


def _by_dev_loss(found: Mapping[str, Any]) -> str:
    """Where nothing else was measured of free text."""
    if found["metric"] != "text" or found.get("dev_loss") is None:
        return ""
    before, after = found["dev_loss"]
    b, a = f"{before:.2f}", f"{after:.2f}"
    change = f"did not change, {b} → {a}" if a == b else f"{'fell' if after < before else 'rose'} from {b} to {a}"
    return (
        f"Held-out loss {change} nats per token, with no interval to say whether that is chance; free text has no exact score. "
        "Read the answers side by side."
    )


def chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
