"""Checks of what was prepared: nothing lost, trained where it should be, the same as inference will see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64

from educe.chat.prompt import render_prompt
from educe.chat.tokenizer_file import adds_bos
from educe.errors import ChatError, EvalError, Refusal
from educe.evaluate.metrics.question import Question
from educe.recipes.build import weighing_of
from educe.recipes.finding import Before, Check, Finding, finding
from educe.recipes.plan import too_many_unused
from educe.recipes.prepare import key_now
from educe.recipes.wanted import metric_of
from educe.store.token_store import Block
from educe.types import Message

# Shares of the rows from which on answers that differ for one prompt are a fault of the data: where answers are right or wrong, and
# where they are free; beyond the last, several answers were drawn for each prompt on purpose.
_CONTRADICT_GRADED, _CONTRADICT, _SAMPLED = 0.01, 0.05, 0.5


def files_are_the_same(b: Before) -> Finding:
    """P01: what was prepared is of the bytes that the files hold now."""
    now, files = key_now(b.recipe, b.prepared.model_dir)
    fix = "They were changed while they were prepared: run the same command again."
    said = f"prepared of files with the key {now}" if now == b.prepared.whole else f"the files now give {now}. {fix}"
    other = b.prepared.made_of not in (None, files)
    if other and now == b.prepared.whole:
        said = f"what is prepared was made of other files: delete {b.prepared.path}"
    return finding("P01", "data files", b.prepared.key, said, fail=other or now != b.prepared.whole)


def rows_are_used(b: Before) -> Finding:
    """P02: how many rows are refused or dropped."""
    s = b.prepared.summary
    unused = s["refused"] + s["dropped"]
    first = [f"{n:,} {code}, first {b.ledger.places[code]}" for code, n in b.ledger.codes.most_common(3)]
    return finding(
        "P02",
        "rows not used",
        f"{unused:,} of {s['rows_in']:,}",
        "; ".join(first) or "every row can be read and rendered",
        fail=bool(too_many_unused(b.recipe, b.prepared)),
        warn=unused > 0.01 * s["rows_in"],
    )


def rows_are_conserved(b: Before) -> Finding:
    """P03: the ledger, counted again, against the summary and the store."""
    s, c, store = b.prepared.summary, b.ledger, b.prepared.store("train")
    kept = np.ones(len(store), bool)
    kept[b.prepared.left_out] = False
    pairs = {
        "rows": (c.statuses.total(), s["rows_in"]),
        "train": (c.statuses["train"], s["rows"]["train"]),
        "dev": (c.statuses["dev"], s["rows"]["dev"]),
        "test": (c.statuses["test"], s["rows"]["test"]),
        "not used": (c.statuses["dropped"] + c.statuses["refused"], s["dropped"] + s["refused"]),
        "not drawn": (c.statuses["not drawn"], s.get("not_drawn", 0)),
        "tokens": (c.tokens, int(store.lengths[kept].sum())),
        "trained tokens": (c.trained, int(store.trained_of[kept].sum())),
    }
    wrong = [f"{name}: the ledger has {a:,}, what was prepared {n:,}" for name, (a, n) in pairs.items() if a != n]
    shown = ("train", "dev", "test", "not used", *(("not drawn",) if s.get("not_drawn") else ()))
    terms = " + ".join(f"{pairs[name][1]:,} {name}" for name in shown)
    total = f"{s['rows_in']:,} = {terms}"
    return finding("P03", "row conservation", total, "; ".join(wrong) or "the ledger's lines add up", fail=bool(wrong))


def turns_follow_the_template(b: Before) -> Finding:
    """P04: rows whose turns the template refuses or that cannot be proved."""
    codes = {code: n for code, n in b.ledger.codes.items() if code.startswith("E-CHAT-") and code != "E-CHAT-310"}
    said = [f"{code} {n:,}, first {b.ledger.places[code]}" for code, n in codes.items()]
    opening = b.prepared.summary["opening_turns"]
    note = f"; {opening:,} rows begin with the assistant: that turn is context" if opening else ""
    number = f"{sum(codes.values()):,} rows refused by the template"
    return finding("P04", "turns and template", number, ("; ".join(said) or "none") + note, warn=bool(codes))


def some_tokens_are_trained(b: Before) -> Finding:
    """P05: the share of tokens that carry loss, and examples where none does, or all do."""
    s, store = b.prepared.summary, b.prepared.store("train")
    trained, lengths = store.trained_of, store.lengths
    none, all_of = int((trained == 0).sum()), int((trained >= lengths - 1).sum())
    unmasked = bool(all_of) and not s["documents"]
    said = f"{none:,} examples without a trained token"
    if unmasked:
        said += f"; {all_of:,} examples are trained whole, prompt included: is the template right?"
    share = s["trained_tokens"] / s["tokens"]
    return finding("P05", "tokens that carry loss", f"{share:.1%}", said, fail=none > 0, warn=unmasked)


def turns_end_in_a_stop(b: Before) -> Finding:
    """P06: the last trained token of every turn is one that ends answers."""
    store, data, is_stop_V = b.prepared.store("train"), b.recipe.data, b.prepared.tokenizer.is_stop_V
    if data.prompt_weight:
        why = "data.prompt_weight trains prompts too: not every end is a turn's"
        return finding("P06", "turns end in a stop token", "-", why, skip=True)
    ends, open_ends, first = 0, 0, -1
    for block in store.blocks():
        at = _ends(block, in_pieces=data.reasoning_weight == 0)
        ids = block.ids_T[at]
        stops = ids < is_stop_V.size
        stops[stops] = is_stop_V[ids[stops]]
        ends, open_ends = ends + at.size, open_ends + int((~stops).sum())
        if first < 0 and not stops.all():
            first = block.first + int(np.searchsorted(block.edges, at[~stops][0], "right")) - 1
    if not ends:
        return finding("P06", "turns end in a stop token", "-", "there is raw text alone, and no turn", skip=True)
    cut = int(b.prepared.summary["unfinished_answers"])
    said = ", ".join(f"{word} {n:,}" for word, n in b.prepared.summary["stop"].items())
    if open_ends:
        row = int(store.rows[first]) + 1
        said = f"the first that does not is of the ledger's line {row}; {cut:,} answers are cut by data.too_long"
    number = f"{ends - open_ends:,} of {ends:,}"
    return finding("P06", "turns end in a stop token", number, said, fail=open_ends > cut, warn=open_ends > 0)


def begins_as_the_template_says(b: Before) -> Finding:
    """P07: as many begin-of-sequence tokens at the start of an example as the template writes, never two."""
    t, name = b.prepared.tokenizer, "begin-of-sequence tokens"
    word = t.template.special.get("bos_token")
    if word is None or word not in t.control:
        return finding("P07", name, "0", "the tokenizer names none")
    bos = t.control[word]
    asked = next((p for s in b.sample if (p := _first_prompt(s.row.messages))), None)
    if asked is None:
        return finding("P07", name, "-", "no row begins with a prompt", skip=True)
    first = render_prompt(asked, t)
    written = int(_leading(np.array(first), np.array([0, len(first)]), bos)[0])
    chats = wrong = 0
    for block in b.prepared.store("train").blocks():
        is_chat = block.trained_of < np.diff(block.edges) - 1  # not raw text
        chats += int(is_chat.sum())
        wrong += int((_leading(block.ids_T, block.edges, bos)[is_chat] != written).sum())
    said = f"the template writes {written} {word!r} at the start; {chats:,} examples begin so"
    if wrong:
        said = f"{wrong:,} examples begin otherwise than with the template's {written}"
    double = written > 1
    if double:
        said += ": it writes the token twice, as servers then do too"
    if not written and adds_bos(t.json, word):
        said += "; the tokenizer alone would put it there, and a server that renders chats does not"
    return finding("P07", name, f"{written}", said, fail=wrong > 0, warn=double)


def prompts_are_inference_s(b: Before) -> Finding:
    """P08: what stands before a trained answer is, to the id, what a server sends."""
    name, weighing = "prompt as at inference", weighing_of(b.recipe.data)
    if not weighing.is_even_inside:
        return finding("P08", name, "-", "prompts or reasoning have weights of their own: see P15", skip=True)
    same, wrong = 0, list[str]()
    for s in b.sample:
        turns = weighing.turns(s.row.messages)
        if not turns or not s.stored or isinstance(s.made, Refusal):
            continue
        last, e = max(turns), s.stored[-1]
        start = _last_begin(e.weights_T > 0)
        tokenizer = b.prepared.tokenizer.for_row(bool(s.row.tools))
        try:
            asked = render_prompt(s.row.messages[:last], tokenizer, s.row.tools)
        except ChatError:
            continue
        if asked == e.ids_T[:start].tolist():
            same += 1
        else:
            wrong.append(str(s.row.source))
    said = f"differs first in {wrong[0]}: delete the prepared data" if wrong else "rendered again as a server would"
    number = f"{same} of {same + len(wrong)} rows"
    return finding("P08", name, number, said, fail=bool(wrong), skip=not (same or wrong))


def ids_are_known(b: Before) -> Finding:
    """P09: every id has an embedding; how many are the unknown token's or single bytes."""
    store, t = b.prepared.store("train"), b.prepared.tokenizer
    known = max(b.facts.vocab_size, max(t.new_tokens.values(), default=-1) + 1)
    model = json.loads(t.json)["model"]
    unknown = model.get("unk_token")
    number = t.stock.token_to_id(unknown) if unknown else None
    names = (
        [f"<0x{k:02X}>" for k in range(256) if k != 10] if model.get("byte_fallback") else []
    )  # a line end is no rarity
    rare = [i for i in (number, *map(t.stock.token_to_id, names)) if i is not None]
    odd = sum(int(np.isin(block.ids_T, rare).sum()) for block in store.blocks()) if rare else 0
    share = odd / max(1, store.tokens[0].size)
    said = f"ids up to {store.max_id:,}, {known:,} have an embedding; {share:.2%} are unknown or single bytes"
    return finding("P09", "ids", f"{share:.2%}", said, fail=store.max_id >= known, warn=share > 0.05)


def little_is_cut(b: Before) -> Finding:
    """P10: what data.max_tokens costs."""
    s = b.prepared.summary
    dropped, lost, unfinished = b.ledger.codes["E-DATA-201"], s["lost_trained_tokens"], s["unfinished_answers"]
    share = lost / max(1, lost + s["trained_tokens"])
    said = (
        f"{dropped:,} rows too long and left out, {s['turn_splits']:,} splits between turns, {s['cut_rows']:,} rows cut: "
        f"of what was split or cut {lost:,} trained tokens and {unfinished:,} stop tokens are lost"
    )
    odd = share > 0.01 or unfinished > 0 or dropped > 0.05 * s["rows_in"]
    number = f"{dropped:,} of {s['rows_in']:,} rows, and {share:.1%} of the others' trained tokens"
    return finding("P10", "rows too long", number, said, warn=odd)


def control_text_is_text(b: Before) -> Finding:
    """P11: rows that hold the text of a control token."""
    n = int(b.prepared.summary["control_strings"])
    said = "trained as text, where a server would make control tokens of it" if n else "none in any text"
    return finding("P11", "control tokens in texts", f"{n:,} rows", said, warn=n > 0)


def texts_are_clean(b: Before) -> Finding:
    """P12: invisible characters and what looks like a secret, in the rows that are looked at before a run."""
    lines = [line for line in b.odd if "invisible" in line or "secret" in line]
    said = " ".join(lines) or "none in the rows that were looked at; `educe data RECIPE` looks at all"
    return finding("P12", "hidden text and secrets", f"{len(lines)} kinds", said, warn=bool(lines))


# Of a curve's subset.
_OF_A_PART = "counted on the whole of the prepared data alone, of which these rows are a part"


def held_out_rows_are_apart(b: Before) -> Finding:
    """P13: copies, and prompts that are trained and tested."""
    s = b.prepared.summary
    if s["leaks"] is None:
        return finding("P13", "copies", "-", _OF_A_PART, skip=True)
    leaks = {split: n for split, n in s["leaks"].items() if n}
    said = ", ".join(f"{n:,} prompts of the {split} rows are trained too" for split, n in leaks.items())
    said = said or "no prompt is both trained and held out"
    kept = int(s["near_copies"]) if b.recipe.data.near_copies == "keep" else 0
    said += f"; {s['near_copies']:,} training rows nearly repeat held-out ones, {'trained all the same' if kept else 'left out'}"
    odd = bool(leaks) or kept > 0 or s["duplicates"] > 0.1 * max(1, s["rows"]["train"])
    return finding("P13", "copies", f"{s['duplicates']:,} exact copies", said, warn=odd)


def packs_are_full(b: Before) -> Finding:
    """P14: lengths, how full packs are, and as many packs for each rank."""
    n, p = b.prepared.summary["length"], b.plan
    per_step = np.diff(p.step_edges)
    uneven = int((per_step[:-1] % b.ranks != 0).sum())
    said = f"median {n['median']}, longest {n['max']} tokens; {p.num_steps:,} steps of {int(per_step[0])} packs"
    if uneven:
        said += f"; in {uneven} of them some of {b.ranks} ranks compute a blank one"
    thin = p.fill < 0.5 and p.num_packs > 2 * int(per_step.max())
    return finding("P14", "packs", f"{p.fill:.1%} full", said, warn=thin or uneven > 0)


def stored_rows_are_right(b: Before) -> Finding:
    """P15: rows encoded again, compared with the stored ids and weights to the bit."""
    same, other, wrong = 0, 0, list[str]()
    for s in b.sample:
        if isinstance(s.made, Refusal):  # too long: split or cut
            other += 1
            continue
        fresh = s.made.examples
        equal = len(fresh) == len(s.stored) and all(
            np.array_equal(a.ids_T, e.ids_T) and a.weights_T.tobytes() == e.weights_T.tobytes()
            for a, e in zip(fresh, s.stored, strict=True)
        )
        if equal:
            same += 1
        else:
            wrong.append(str(s.row.source))
    said = f"encoded again, ids and weights are the stored ones{f'; {other} were split or cut' if other else ''}"
    if wrong:
        said = f"the stored ids or weights of {', '.join(wrong[:3])} are others: delete {b.prepared.path}"
    number = f"{same} of {same + len(wrong)} rows"
    return finding("P15", "stored rows", number, said, fail=bool(wrong), skip=not (same or wrong))


def one_answer_each(b: Before) -> Finding:
    """P16: prompts that are trained with answers that differ. Where most rows are so, several answers were drawn by design."""
    name, c = "prompts with several answers", b.prepared.summary["contradictions"]
    if c is None:
        return finding("P16", name, "-", _OF_A_PART, skip=True)
    share = c["rows"] / max(1, b.prepared.summary["rows"]["train"])
    sampled = share > _SAMPLED or any(r.trees.paths == "all" for r in b.recipe.data.sources.values())
    said = "every prompt has one answer"
    if c["rows"]:
        said = f"{c['prompts']:,} prompts in {c['rows']:,} rows have answers that differ, such as {' and '.join(c['first'])}"
    graded = metric_of(b.recipe).kind != "text"
    odd = share > (_CONTRADICT_GRADED if graded else _CONTRADICT) and not sampled
    if odd:
        said += ": none of them can be learned. Keep the right one, or tell the prompts apart"
    elif c["rows"] and sampled:
        said += ": so many that they look drawn by design, several for each prompt"
    return finding("P16", name, f"{share:.1%} of the rows", said, warn=odd)


def metric_fits_the_rows(b: Before) -> Finding:
    """P17: the expected answers of held-out rows are right by the recipe's metric, and what it names is there. Nothing of it runs."""
    from educe.recipes.answers import questions_of  # torch
    from educe.recipes.grading import check_fit_unrun

    metric, name = metric_of(b.recipe), "metric fits the rows"
    if metric.kind == "text":
        return finding("P17", name, metric.kind, "free text is compared by its loss", skip=True)

    def asked(split: Literal["test", "dev"]) -> list[Question]:
        there = b.prepared.has_conversations(split)
        return [a.question for a in questions_of(b.prepared, b.recipe, split)] if there else []

    test, dev = asked("test"), asked("dev")
    check_fit_unrun(metric, test)  # what `eval` would refuse
    try:
        check_fit_unrun(metric, dev)
    except EvalError as e:
        said = f"dev rows will not be graded while training: {e.where}: {e.found}"
        return finding("P17", name, metric.kind, said, warn=True)
    known = " as far as is known before its code runs" if metric.kind in ("custom", "pass_at_k") else ""
    said = f"it fits the expected answers of {len(test) + len(dev):,} held-out rows{known}"
    return finding("P17", name, metric.kind, said if test or dev else "no answer is held out", skip=not (test or dev))


def _first_prompt(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Up to the first thing that a user says; nothing where an assistant begins."""
    at = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    head = tuple(messages[: at + 1])
    return () if any(m.role == "assistant" for m in head) else head


def _ends(block: Block, *, in_pieces: bool) -> Int64[np.ndarray, " k"]:
    """Where turns end: at the end of each stretch of trained tokens; where turns are trained `in_pieces`, at that of the last one
    of an example alone. Raw text ends where it ends: that is none."""
    trained_T = block.weights_T > 0
    following_T = np.append(trained_T[1:], False)
    following_T[block.edges[1:] - 1] = False
    ends = np.flatnonzero(trained_T & ~following_T)
    of = np.searchsorted(block.edges, ends, "right") - 1
    kept = (block.trained_of < np.diff(block.edges) - 1)[of]
    if in_pieces:
        kept &= np.append(of[1:] != of[:-1], True)[: of.size]
    found: np.ndarray = ends[kept]
    return found


def _last_begin(trained_T: Bool[np.ndarray, " t"]) -> int:
    """Where the last stretch of trained tokens begins."""
    begins = np.flatnonzero(trained_T & ~np.append(False, trained_T[:-1]))
    return int(begins[-1]) if begins.size else 0


def _leading(ids_T: Any, edges: Any, bos: int) -> np.ndarray:
    """How many of the first two ids of each example are `bos`, from the first on."""
    first = ids_T[edges[:-1]] == bos
    second = ids_T[np.minimum(edges[:-1] + 1, edges[1:] - 1)] == bos
    counted: np.ndarray = first.astype(np.int64) + (first & second & (np.diff(edges) > 1))
    return counted


DATA: dict[str, Check] = {
    "P01": files_are_the_same,
    "P02": rows_are_used,
    "P03": rows_are_conserved,
    "P04": turns_follow_the_template,
    "P05": some_tokens_are_trained,
    "P06": turns_end_in_a_stop,
    "P07": begins_as_the_template_says,
    "P08": prompts_are_inference_s,
    "P09": ids_are_known,
    "P10": little_is_cut,
    "P11": control_text_is_text,
    "P12": texts_are_clean,
    "P13": held_out_rows_are_apart,
    "P14": packs_are_full,
    "P15": stored_rows_are_right,
    "P16": one_answer_each,
    "P17": metric_fits_the_rows,
}
