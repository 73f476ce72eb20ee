"""scores.json → the verdict in words: was tuning worth it, would a prompt have done, what was forgotten, at what price?

The first sentence is the headline. It says no more than the paired tests allow: "do not tune" needs an interval that leaves no
room for a gain worth having, and where the rows cannot tell it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from educe.evaluate.prompting import AS_IT_IS
from educe.stats import FEWEST, wilson

ALPHA = 0.05
WORTH = (
    0.05  # a gain below this share of the rows (or of the mean score, or of the loss) is not worth a model of one's own
)
OWN = ("untouched", "few_shot", "tuned")

# What the rows say of the tuned model beside another: better, but by no more than is worth it ("little"); as good or less so, with no
# room for a gain that is worth it ("alike"); or nothing ("open").
Case = Literal["better", "little", "worse", "alike", "open"]


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
        said.append(_prompted(prompt, found))
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
        return share(systems[name]["value"]) if shares else f"{systems[name]['value']:.2f}"

    against = {
        c["before"]: Against(
            case=_case(c["difference"], sure=c.get("p_holm", c["p"]) < ALPHA),
            value=value(c["before"]),
            test=_test(c),
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
    low, high = (f"{100 * d[k]:+.1f}" if shares else f"{d[k]:+.2f}" for k in ("low", "high"))
    num = "no row" if not changed else f"{changed} row{'s' if changed > 1 else ''}"
    return (
        f"{num.capitalize()} of {rows} changed, and the test needs {FEWEST} to show a difference: "
        f"anything from {low} to {high}{' points' if shares else ''} may have gone unseen."
    )


def _test(c: Mapping[str, Any]) -> str:
    """p, and where the interval seems to say something else what decides."""
    d = c["difference"]
    apart = c["p"] >= ALPHA and not d["low"] <= 0 <= d["high"]
    holm = f", by Holm {chance(c['p_holm'])}" if "p_holm" in c else ""
    return chance(c["p"]) + holm + (", which decides though the interval leaves out 0" if apart else "")


def _case(gain: Mapping[str, float], *, sure: bool) -> Case:
    if sure and gain["value"] != 0:
        return "worse" if gain["value"] < 0 else "better" if gain["high"] > WORTH else "little"
    # an interval below 0 where the test shows nothing is one of too few rows
    return "alike" if 0 <= gain["high"] <= WORTH else "open"


# How well what is not worth tuning for does.
_WELL: dict[str, str] = {"alike": "as well", "little": "nearly as well"}


def _headline(told: _Told, plain: Against, prompt: Against | None, found: Mapping[str, Any]) -> str:
    forgot = ", and the model forgot" if _lost_much(found) else ""
    if plain.case == "worse":
        return f"Do not tune: it did harm, {told.change}."
    if prompt is not None and prompt.case == "worse":
        return f"Do not tune: a prompt does better, {prompt.value} against {told.tuned}{forgot}."
    if plain.case in _WELL:
        return f"Do not tune: the untouched model does {_WELL[plain.case]}, {told.change}{forgot}."
    # A prompt is as good as tuning only where tuning is known to be good for something.
    if prompt is not None and prompt.case in _WELL and plain.case == "better":
        return f"Do not tune: a prompt does {_WELL[prompt.case]}, {prompt.value} against {told.tuned}{forgot}."
    if plain.case == "open":
        return f"No difference shown: {told.change}{forgot}."
    unsure = ", but not shown to beat a prompt" if prompt is not None and prompt.case != "better" else ""
    price = ", at a price" if forgot and not unsure else ""
    return f"Tuning helped{unsure}{price}: {told.change}{forgot}."


def _than(case: Case) -> str:
    words: dict[Case, str] = {"better": "better", "little": "better by little", "worse": "worse"}
    return words.get(case, "not shown to be better")


def _prompted(against: Against, found: Mapping[str, Any]) -> str:
    prompt = found["systems"].get("few_shot", {}).get("prompt")
    told = f"{against.value}; the tuned one is {_than(against.case)} ({against.test})."
    if not prompt:
        return f"With examples in its prompt the untouched model reaches {told}"
    if prompt["label"] == AS_IT_IS and prompt.get("dev_rows", 1):
        return f"No prompt makes the untouched model better ({prompt['how']})."
    return f"With its best prompt ({prompt['label']}; {prompt['how']}) the untouched model reaches {told}"


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
        little, mend = (
            ("", " A lower rate, replay, LoRA or `educe blend` forget less.")
            if _lost_much(found)
            else (", but little", "")
        )
        return f"Forgotten{little}: {'; '.join(filter(None, [*general['flags'], unfit]))}.{mend}"
    change = text["change"]["value"] / text["before"]
    right = unfit or f"{prompts['right'][0]} → {prompts['right'][1]} of {prompts['questions']} general questions right"
    return f"Nothing is shown to be forgotten: general text {change:+.1%} bits per byte, {right}."


def _price(found: Mapping[str, Any]) -> str:
    """What tuning took, and what the prompt would take with every request."""
    said = []
    if found.get("training_s") is not None:
        said.append(f"{_time(found['training_s'])} of training steps")
    plain, prompted = (found["systems"].get(n, {}).get("prompt_tokens") for n in ("untouched", "few_shot"))
    if plain is not None and prompted is not None and prompted > plain and not found.get("pairs") and _helped(found):
        said.append(f"{prompted - plain:+.0f} tokens with every request for the prompt")
    return f"Price: {' against '.join(said)}." if said else ""


def _helped(found: Mapping[str, Any]) -> bool:
    """Whether the best prompt does any better than none."""
    if found["metric"] == "text":
        loss = (found.get("loss") or {}).get("systems", {})
        return bool(loss.get("few_shot", 0.0) < loss.get("untouched", 0.0))
    return bool(found["systems"]["few_shot"]["value"] > found["systems"]["untouched"]["value"])


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _by_pairs(pairs: Mapping[str, Any]) -> str:
    """Learned from pairs: no answer is the right one."""
    before, after = map(share, pairs["ranked"])
    said = f"{before} → {after} of the dev pairs ranked right (log-probability per token)"
    if number := pairs.get("number"):
        i = wilson(round(number * pairs["ranked"][1]), number)
        how = f"log-probability per token; 95 % interval after {share(i.low)} to {share(i.high)}"
        said = f"{before} → {after} of {number} dev pairs ranked right ({how})"
    if pairs.get("loss"):
        old, new = pairs["loss"]
        change = "fell" if new < old else "rose" if new > old else "stayed"
        said += f"; held-out loss of a pair {change}, {old:.3g} → {new:.3g}"
    if pairs["kl"] is not None:
        said += f"; KL from the stage's start {pairs['kl']:.2g} nats per token on chosen answers"
    return f"{said}. Which answers are better is not graded: read them side by side, or let a model judge them (`educe judge`)."


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


def share(value: float) -> str:
    """In per cent, with a digit after the point where it is not a whole number."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
