"""A run's model as lm-evaluation-harness asks models: log-probabilities of continuations and of whole texts, and answers.

Needs lm-eval (`educe[lm-eval]`): imported by one recipe, where that is installed. Texts are cut, and their beginnings chosen, as in
lm-eval's own class for transformers' models, so that figures compare. Chat prompts are the ids that educe trains and answers with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from educe.chat.assemble import encode_pieces
from educe.chat.prompt import answer_to, prompt_segments
from educe.chat.tokens import ChatTokenizer
from educe.errors import EvalError
from educe.evaluate.choices import behind, head_of, read_texts, weighed
from educe.files.hashes import hash_json
from educe.model.load import CausalLM
from educe.sample.draw import Chooser, chooser_of
from educe.sample.local import LocalSampler
from educe.types import Answer, Example, Message, Sampling

MOST_NEW_TOKENS = 256  # where a task names no number, as in lm-eval
_PIECE = 64  # texts that are read between two writes to disk
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """A prompt that the template made: its ids, and the messages before the answer. `opened`: the task began the answer itself."""

    ids: tuple[int, ...]
    messages: tuple[Message, ...]
    opened: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How a task wants its answers: drawn how, cut before which texts."""

    sampling: Sampling
    until: tuple[str, ...]


# Gets places of requests and the replies to them, some at a time.
Keep = Callable[[Sequence[int], Sequence[Any]], None]
# Is given the places of requests whose replies are not known.
Ask = Callable[[Sequence[int], Keep], None]
# (keys, ask, ready) → the reply to each request; `ready` is called before any is asked.
Replies = Callable[[Sequence[str], Ask, Callable[[], Any]], list[Any]]


def asked_anew(keys: Sequence[str], ask: Ask, ready: Callable[[], Any]) -> list[Any]:
    """Nothing is known."""
    found: dict[int, Any] = {}
    ask(range(len(keys)), lambda places, replies: found.update(zip(places, replies, strict=True)))
    return [found[k] for k in range(len(keys))]


class HarnessModel(LM):  # type: ignore[misc]
    """`positions`: the model's; `shortened` counts texts whose beginning was left out for want of them. `progress(done, total)`
    is called as requests of one kind are done. Draws, where a task wants them, depend on `seed`. The model is loaded where a reply
    is not known by `replies`."""

    def __init__(
        self,
        model: Callable[[], CausalLM],
        tokenizer: ChatTokenizer,
        *,
        capacity_tokens: int,
        positions: int,
        seed: int,
        replies: Replies = asked_anew,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._capacity, self._positions = model, tokenizer, capacity_tokens, positions
        self._seed, self._replies, self._progress = seed, replies, progress
        bos = tokenizer.template.special.get("bos_token")
        self._first = tokenizer.control.get(bos or "", tokenizer.eos)
        self._chats: dict[str, _Chat] = {}
        self.shortened = 0

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-probability, and whether each of its tokens is the likeliest."""
        read = self._read([self._continued(*r.args[:2]) for r in requests])
        return [(log_p, greedy) for log_p, greedy in read]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text its log-probability, in windows as long as the model has positions; every token is predicted once."""
        examples, owners = [], []
        for k, r in enumerate(requests):
            ids = [*head_of(self._tokenizer), *self._tokenizer.encode_plain(r.args[0])]
            windows = get_rolling_token_windows(ids, self._first, self._positions - 1, 1)
            for before, predicted in map(make_disjoint_window, windows):
                examples.append(weighed([*before, *predicted], len(before)))
                owners.append(k)
        sums = [0.0] * len(requests)
        for k, (log_p, _) in zip(owners, self._read(examples), strict=True):
            sums[k] += log_p
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings) the answer, up to the first of the texts that end it."""
        groups: dict[_Wanted, list[int]] = {}
        for k, r in enumerate(requests):
            groups.setdefault(self._wanted(r.args[1]), []).append(k)
        texts = [""] * len(requests)
        done = 0
        for wanted, members in groups.items():
            given = self._answers([requests[k] for k in members], wanted, done, len(requests))
            for k, text in zip(members, given, strict=True):
                texts[k] = text
            done += len(members)
        return texts

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Its ids are remembered, since a text does not tell the template's control tokens from a task's words.

        Without `add_generation_prompt` the last message is the beginning of the answer, and stands behind the prompt as it is.
        """
        messages = tuple(Message(role=m["role"], content=m["content"]) for m in chat_history)  # type: ignore[arg-type]
        start = "" if add_generation_prompt else messages[-1].content
        messages = messages if add_generation_prompt else messages[:-1]
        segments = prompt_segments(messages, self._tokenizer)
        ids = encode_pieces(segments, self._tokenizer)
        ids += self._tokenizer.encode_plain(start, inside=True) if start else []
        text = "".join(s.text for s in segments) + start
        self._chats[text] = _Chat(ids=tuple(ids), messages=messages, opened=bool(start))
        return text

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval would keep prompts by."""
        return self._tokenizer.tokenizer_hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The run's own; it has no other."""
        return self._tokenizer.template.source

    def _read(self, examples: Sequence[Example]) -> list[tuple[float, bool]]:
        """Of the weighted tokens of each text the log-probability, and whether each is the likeliest."""

        def ask(places: Sequence[int], keep: Keep) -> None:
            known = len(examples) - len(places)
            for at in range(0, len(places), _PIECE):
                piece, tell = places[at : at + _PIECE], partial(_tell, self._progress, known + at, len(examples))
                read = read_texts(self._model(), [examples[k] for k in piece], self._capacity, tell)
                keep(piece, [(r.log_p, r.greedy) for r in read])

        return self._replies([hash_json(["read", *_written(e)]) for e in examples], ask, self._model)

    def _continued(self, context: str, continuation: str) -> Example:
        chat = self._chat(context)
        if chat is not None:
            more = self._tokenizer.encode_plain(continuation, inside=True)
            made = weighed([*chat.ids, *more], len(chat.ids)) if more else None
        else:
            stem = context.rstrip()
            text = context[len(stem) :] + continuation
            made = behind(stem, text, self._tokenizer, self._first) if continuation else None
        if made is None:
            raise EvalError(
                101, "lm-eval", "asks for the log-probability of nothing.", "Mend the task: a choice is empty."
            )
        return self._within(made)

    def _within(self, made: Example) -> Example:
        """Without what is in front of the model's positions."""
        if made.ids_T.size <= self._positions:
            return made
        self.shortened += 1
        ids, weights = made.ids_T[-self._positions :], made.weights_T[-self._positions :].copy()
        weights[0] = 0  # nothing stands before it
        return Example(ids_T=ids, weights_T=weights)

    def _chat(self, context: str) -> _Chat | None:
        """None for bare text. Raises `EvalError` where prompts are a template's and this is none of them."""
        if self._chats and context and context not in self._chats:
            found = "changes the prompts that the chat template made, and their ids are not known."
            raise EvalError(101, "lm-eval", f"a task {found}", "Leave --chat out.")
        return self._chats.get(context)

    def _wanted(self, settings: dict[str, Any]) -> _Wanted:
        found = normalize_gen_kwargs(settings, MOST_NEW_TOKENS)
        other = sorted(k for k, v in found.items() if k not in _KNOWN and v is not None)
        if other:
            fix = f"Take {', '.join(other)} out of the task's generation_kwargs."
            raise EvalError(
                101, "lm-eval", f"wants answers by settings that educe does not have: {', '.join(other)}.", fix
            )
        until = found.get("until") or []
        return _Wanted(
            sampling=Sampling(
                max_new_tokens=int(found["max_gen_toks"]),
                temperature=float(found["temperature"]) if found["do_sample"] else 0.0,
                top_p=float(found.get("top_p") or 1.0),
                seed=self._seed,
            ),
            until=tuple(filter(None, [until] if isinstance(until, str) else until)),
        )

    def _answers(self, requests: Sequence[Instance], wanted: _Wanted, done: int, total: int) -> list[str]:
        most = wanted.sampling.max_new_tokens
        chats = [self._chat(r.args[0]) for r in requests]
        prompts = [self._prompt(r.args[0], chat, most) for r, chat in zip(requests, chats, strict=True)]
        asked: dict[str, int] = {}
        keys = []
        for r in requests:  # a request that is made several times draws as many answers
            key = hash_json([r.task_name, r.doc_id, r.idx])[:24]
            asked[key] = asked.get(key, -1) + 1
            keys.append(f"{key}:{asked[key]}")

        def ask(places: Sequence[int], keep: Keep) -> None:
            known = done + len(prompts) - len(places)

            def told(batch: Sequence[int], answers: Sequence[Answer]) -> None:
                nonlocal known
                known += len(batch)
                keep(batch, [a.text for a in answers])
                self._progress(known, total)

            choose = ending(chooser_of(wanted.sampling, keys), wanted.until, self._tokenizer)
            LocalSampler(self._model(), self._tokenizer).answer_some(places, prompts, most, told, choose=choose)

        how = [asdict(wanted.sampling), wanted.until]
        draws = keys if wanted.sampling.temperature > 0 else [""] * len(keys)
        names = [hash_json(["answer", p, d, how]) for p, d in zip(prompts, draws, strict=True)]
        texts = self._replies(names, ask, self._model)
        return [
            before(text if c is None or c.opened else answer_to(text, c.messages, self._tokenizer), wanted.until)
            for text, c in zip(texts, chats, strict=True)
        ]

    def _prompt(self, context: str, chat: _Chat | None, most: int) -> list[int]:
        """Ids of the context, without a beginning that would leave no room for the answer."""
        ids = [*head_of(self._tokenizer), *self._tokenizer.encode_plain(context)] if chat is None else list(chat.ids)
        room = self._positions - most
        if room < 1:
            found = f"wants answers of {most} tokens, and the model has {self._positions} positions."
            raise EvalError(101, "lm-eval", found, "Give the task fewer max_gen_toks.")
        self.shortened += len(ids) > room
        return ids[-room:] or [self._first]


def _written(e: Example) -> tuple[list[int], int]:
    """What a text's reply depends on: its ids, and where its weight begins."""
    return e.ids_T.tolist(), int(np.flatnonzero(e.weights_T)[0])


def _tell(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def before(text: str, until: Sequence[str]) -> str:
    """The text up to the first of those that end it."""
    for end in until:
        text = text.partition(end)[0]
    return text


def ending(choose: Chooser, until: Sequence[str], tokenizer: ChatTokenizer) -> Chooser:
    """The same choice of tokens until a row's text holds one of the texts that end it: then a stop token, so that the row leaves."""
    if not until:
        return choose
    # A text of n bytes lies within the last n tokens and what one of them adds before it.
    tail = max(len(end.encode()) for end in until) + 4
    made: dict[int, list[int]] = {}

    def chosen(logits_BV: Any, rows: Sequence[int], place: int) -> list[int]:
        tokens = choose(logits_BV, rows, place)
        for k, row in enumerate(rows):
            ids = made.setdefault(row, [])
            if any(end in tokenizer.decode(ids[-tail:]) for end in until):
                tokens[k] = tokenizer.eos
            ids.append(tokens[k])
        return tokens

    return chosen
