"""The held-out sets that every stage's model is measured on, found in the stages' prepared data, and one model's measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from educe.chat.prompt import render_prompt
from educe.config import Recipe, StagedRecipe
from educe.config.recipe import CustomMetric
from educe.evaluate.compare import grade
from educe.evaluate.drift import Texts
from educe.evaluate.general_prompts import GeneralPrompt, is_right
from educe.evaluate.stages import Rows
from educe.files.hashes import hash_file, hash_json
from educe.files.run_dir import RunDir
from educe.model.device import Device
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.preference.reference import reference_log_p
from educe.recipes.answers import Asked, answers_in, questions_of
from educe.recipes.eval import answering_device, data_of, recipe_of
from educe.recipes.expected import after_prompts
from educe.recipes.forgetting import QUESTIONS, general_questions, general_texts, heard
from educe.recipes.grading import Grading, check_fit, grading_of
from educe.recipes.kept_answers import KeptAnswers, OnAnswers, answers_depend_on
from educe.recipes.prepare import Prepared
from educe.recipes.stage_leaks import leaks_between
from educe.seeds import derive, permute
from educe.types import Answer, Example, Sampling

# Of each set, tokens that are read at most: a mean, whose interval says what more would bring.
MOST_TOKENS = {"cpu": 12_000}
_ELSEWHERE = 400_000
MOST_PAIRS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is measured: texts of the domain and their bytes, general text, the task's questions, general questions, pairs. `packs`:
    rows may be packed; `asking`: data whose tokenizer renders prompts, and its recipe."""

    device: Device
    packs: bool
    asking: Prepared
    recipe: Recipe
    domain: Texts | None
    domain_bytes: tuple[float, ...]
    general: Texts
    general_bytes: tuple[float, ...]
    asked: list[Asked]
    grading: Grading | None
    expected: Texts | None
    prompts: list[GeneralPrompt]
    prompt_ids: list[list[int]]
    pairs: list[Example]

    @property
    def key(self) -> str:
        """Of all that a measurement depends on but the weights."""
        e, tokenizer = self.recipe.evaluation, self.asking.tokenizer
        texts = [t.key for t in (self.domain, self.general, self.expected) if t is not None]
        asked = [[a.question.row, list(a.question.prompt), a.question.expected] for a in self.asked]
        pairs = [p.ids_T.tolist() for p in self.pairs]
        how: list[Any] = [*answers_depend_on(tokenizer, self.device), tokenizer.template_hash]
        if isinstance(e.metric, CustomMetric):  # what it is called is not what it does
            how.append(hash_file(Path(e.metric.function.rpartition(":")[0])))
        return hash_json([texts, asked, self.recipe.evaluation.model_dump(mode="json"), self.prompt_ids, pairs, how])[
            :24
        ]

    def kept(self, model: Callable[[], CausalLM], start: str, weights: str, say: Say) -> KeptAnswers:
        """The answers of a model of these weights; tokens that the stages added begin as in the `start`'s. Both are hashes."""
        tokenizer = self.asking.tokenizer
        of = ["stages", start, weights, *answers_depend_on(tokenizer, self.device)]
        return KeptAnswers(model, of, tokenizer, say)


def scale_of(staged: StagedRecipe, runs: Sequence[RunDir], say: Say) -> Scale:
    """The sets of the last stage of each kind that has one. Raises what `eval` raises."""
    recipes = [recipe_of(run) for run in runs]
    prepared = [data_of(run, recipe, say) for run, recipe in zip(runs, recipes, strict=True)]
    for line in leaks_between(dict(zip(staged.names, prepared, strict=True))):
        say(f"warning: {line}")
    last = {recipe.objective.kind: k for k, recipe in enumerate(recipes)}
    k = last.get("sft", len(runs) - 1)
    recipe, asking = recipes[k], prepared[k]
    device = answering_device(recipe, runs[k], say)
    packs = all(bool(run.load(run.provenance)["packed"]) for run in runs)
    capacity = recipe.train.micro_batch_tokens if packs else 1
    room = MOST_TOKENS.get(device.kind, _ELSEWHERE)
    domain, domain_bytes = _domain(prepared[last["pretrain"]], room, capacity) if "pretrain" in last else (None, ())
    general, general_bytes = general_texts(asking, recipe, None, packs=packs)
    asked: list[Asked] = []
    grading, expected = None, None
    if "sft" in last and asking.has_conversations("test"):
        asked = questions_of(asking, recipe)
        if recipe.evaluation.metric.kind not in ("text", "pass_at_k"):
            grading = grading_of(recipe.evaluation.metric, say, allow_code=False)
            check_fit(grading, [a.question for a in asked])
        else:
            expected = _expected(asking, asked, recipe, room, capacity)
    prompts, ids = general_questions(asking.tokenizer, say)
    return Scale(
        device=device,
        packs=packs,
        asking=asking,
        recipe=recipe,
        domain=domain,
        domain_bytes=domain_bytes,
        general=general,
        general_bytes=general_bytes,
        asked=asked,
        grading=grading,
        expected=expected,
        prompts=prompts,
        prompt_ids=ids,
        pairs=_pairs(prepared[last["preference"]], staged.stages[0].train.seed) if "preference" in last else [],
    )


def measured(
    model: CausalLM, kept: KeptAnswers, scale: Scale, name: str, on_answers: OnAnswers
) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    """One model on all sets, and its answers, which are `kept`. `scale.general` remembers the start."""
    drift = scale.general.drift(model)
    found = {
        "general": Rows(of=drift.nll_R, out_of=scale.general_bytes),
        "kl": Rows(of=[max(0.0, kl) for kl in drift.kl_R], out_of=scale.general.weights_R),
    }
    if scale.domain is not None:
        found["domain"] = Rows(of=scale.domain.nll(model), out_of=scale.domain_bytes)
    if scale.expected is not None:
        found["task_loss"] = Rows(of=scale.expected.nll(model), out_of=scale.expected.weights_R)
    if scale.pairs:
        found["pairs"] = Rows(of=_ranked(model, scale))
    answers: list[dict[str, Any]] = []
    if scale.asked:
        task, answers = _task(kept, scale, name, on_answers)
        found |= task
    given, _ = kept.answer(f"{name}, general questions", scale.prompt_ids, QUESTIONS, on_answers)
    said = heard(scale.prompts, given, scale.asking.tokenizer)
    found["questions"] = Rows(of=[float(is_right(p, a.text)) for p, a in zip(scale.prompts, said, strict=True)])
    found["questions_end"] = Rows(of=_ends(given))
    for p, a, right in zip(scale.prompts, said, found["questions"].of, strict=True):
        answers.append({"set": "general", "row": p.key, "answer": a.text, "stopped": a.stopped, "score": right})
    return found, answers


def as_json(found: dict[str, Rows]) -> dict[str, Any]:
    return {key: {"of": list(rows.of), "out_of": list(rows.out_of)} for key, rows in found.items()}


def of_json(found: dict[str, Any]) -> dict[str, Rows]:
    return {key: Rows(of=rows["of"], out_of=rows["out_of"]) for key, rows in found.items()}


def _task(
    kept: KeptAnswers, scale: Scale, name: str, on_answers: OnAnswers
) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    prompts = [render_prompt(a.prompt, scale.asking.tokenizer, a.row.tools) for a in scale.asked]
    how = Sampling(max_new_tokens=scale.recipe.evaluation.max_new_tokens)
    given, _ = kept.answer(name, prompts, how, on_answers)
    found, said = {"ends": Rows(of=_ends(given))}, answers_in(given, scale.asked, scale.asking)
    scores: list[float | None] = [None] * len(said)
    if scale.grading is not None:
        lines = grade([a.question for a in scale.asked], said, scale.grading.grader)
        scores = [float(line["score"]) for line in lines]
        found["task"] = Rows(of=[float(line["score"]) for line in lines])
    told = zip(scale.asked, said, scores, strict=True)
    return found, [
        {"set": "task", "row": q.question.row, "answer": a.text, "stopped": a.stopped, "score": s} for q, a, s in told
    ]


def _ends(answers: Sequence[Answer]) -> list[float]:
    """By themselves, and after something: a model that says nothing ends every time."""
    return [float(a.stopped and bool(a.text.strip())) for a in answers]


def _ranked(model: CausalLM, scale: Scale) -> list[float]:
    """For each pair 1 where the chosen answer is the likelier one, per token."""
    lengths = np.array([e.ids_T.size for e in scale.pairs], np.int64)
    capacity = scale.recipe.train.micro_batch_tokens if scale.packs else 1
    groups = plan_once(lengths, capacity_tokens=capacity, pairs=True)
    log_p_N = reference_log_p(model, (build_batch([scale.pairs[i] for i in g]) for g in groups))
    per_token = log_p_N / np.array([(e.weights_T > 0).sum() for e in scale.pairs])
    return [float(chosen > rejected) for chosen, rejected in per_token.reshape(-1, 2).tolist()]


def _domain(prepared: Prepared, room: int, capacity: int) -> tuple[Texts, tuple[float, ...]]:
    """Test documents (dev ones where there are none), drawn by the seed; how they end is not counted."""
    name = "test" if len(prepared.store("test")) else "dev"
    store, tokenizer = prepared.store(name), prepared.tokenizer
    rows, which = np.unique(store.rows, return_inverse=True)
    order = permute(rows.size, derive(0, "domain"))
    ends = np.cumsum(np.bincount(which, store.lengths)[order])
    chosen = np.sort(order[: max(2, int((ends <= room).sum()))])
    examples, numbers = [], []
    sizes = np.zeros(chosen.size)
    for i in np.flatnonzero(np.isin(which, chosen)).tolist():
        e = store[i]
        weights_T = np.where(e.ids_T == tokenizer.eos, np.float32(0), e.weights_T)
        if not weights_T.any():
            continue
        number = int(np.searchsorted(chosen, which[i]))
        sizes[number] += len(tokenizer.decode(e.ids_T[weights_T > 0].tolist()).encode())
        examples.append(replace(e, weights_T=weights_T))
        numbers.append(number)
    return Texts(examples, numbers, capacity), tuple(sizes.tolist())


def _expected(prepared: Prepared, asked: Sequence[Asked], recipe: Recipe, room: int, capacity: int) -> Texts | None:
    """The expected answers of some questions behind their prompts."""
    ids = [render_prompt(a.prompt, prepared.tokenizer, a.row.tools) for a in asked]
    order = permute(len(asked), derive(recipe.train.seed, "expected")).tolist()
    ends = np.cumsum([2 * len(ids[i]) for i in order])
    drawn = order[: max(2, int((ends <= room).sum()))]
    examples, rows = after_prompts(prepared, [ids[i] for i in drawn], [asked[i] for i in drawn])
    return Texts(examples, rows, capacity) if len(examples) > 1 else None


def _pairs(prepared: Prepared, seed: int) -> list[Example]:
    """Both answers of test pairs (dev ones where there are none), drawn by the seed."""
    store = prepared.store("test" if len(prepared.store("test")) else "dev")
    drawn = permute(len(store) // 2, derive(seed, "pairs"))[:MOST_PAIRS]
    return [store[2 * int(k) + which] for k in np.sort(drawn) for which in (0, 1)]
