"""Answers from a loaded model: batched, left-padded, cached; the ids all prompts begin with are computed once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from educe.chat.prompt import answer_to, render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.sample.draw import Chooser, chooser_of, likeliest
from educe.types import Answer, Prompt, Sampling

# Prompt tokens of one batch: bounds the memory of the cache.
BATCH_TOKENS = 4096


class Answering(Protocol):
    """A loaded model that can answer: `network` is called, `base` carries the config, `answering()` holds the right mode."""

    network: Any
    base: Any

    @property
    def device_kind(self) -> str: ...

    def answering(self) -> AbstractContextManager[None]: ...


class LocalSampler:
    """An answer ends at a stop token (not part of its text), after `max_new_tokens`, or where the model has no more positions, as on
    a server. `name`: whose answers these are."""

    def __init__(self, model: Answering, tokenizer: ChatTokenizer, name: str = "local") -> None:
        self._model, self._tokenizer, self.name = model, tokenizer, name

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """One answer to each prompt, rendered as in training, without what the template makes each answer begin with.

        A draw depends on (seed, key, place), not on the prompts beside it. The logits do so by rounding: in fp32 by 1e-6 or so.
        """
        ids = [render_prompt(p.messages, self._tokenizer, p.tools) for p in prompts]
        choose = chooser_of(sampling, [p.key for p in prompts])
        answers = self.answer(ids, sampling.max_new_tokens, progress, choose=choose)
        return [
            replace(a, text=answer_to(a.text, p.messages, self._tokenizer, p.tools))
            for a, p in zip(answers, prompts, strict=True)
        ]

    def answer(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
        alive: Callable[[], None] = lambda: None,
        choose: Chooser = likeliest,
    ) -> list[Answer]:
        """Of each prompt's ids. `progress` gets how many are done, after each batch; `alive` is called before each token."""
        made: dict[int, Answer] = {}

        def keep(places: Sequence[int], answers: Sequence[Answer]) -> None:
            made.update(zip(places, answers, strict=True))
            if progress is not None:
                progress(len(made))

        self.answer_some(range(len(prompts)), prompts, max_new_tokens, keep, alive, choose)
        return [made[i] for i in range(len(prompts))]

    def answer_some(
        self,
        wanted: Collection[int],
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        keep: Callable[[Sequence[int], Sequence[Answer]], None],
        alive: Callable[[], None] = lambda: None,
        choose: Chooser = likeliest,
    ) -> None:
        """Those at the places `wanted`; `keep` gets places and answers of a batch as it is done. Without the first batches the others
        are what they were: what is left of a question list is answered to the same bits."""
        full = [i for i in wanted if not self._room(prompts[i], max_new_tokens)]
        if full:
            keep(full, [self._as_answer([])] * len(full))
        left = sorted({*wanted} - {*full})
        shared = _shared_prefix(prompts) if self._holds_keys_alone() else 0
        with self._model.answering():
            if not self._caches():
                for i in left:
                    ids = []
                    for token in self._uncached(prompts[i], self._room(prompts[i], max_new_tokens), i, choose):
                        ids.append(token)
                        alive()
                    keep([i], [self._as_answer(ids)])
                return
            start = self._prefill(prompts[0][:shared]) if shared and left else None
            for batch in _batches(prompts, shared, max_new_tokens, left):
                made = self._decode([prompts[i] for i in batch], batch, shared, start, max_new_tokens, alive, choose)
                keep(batch, [self._as_answer(ids) for ids in made])

    def stream(self, prompt: list[int], max_new_tokens: int) -> Iterator[str]:
        """Text of one answer as it is made; joined it is the answer's text."""
        ids: list[int] = []
        shown = ""
        with self._model.answering():
            for token in (self._cached if self._caches() else self._uncached)(
                prompt, self._room(prompt, max_new_tokens)
            ):
                if token in self._tokenizer.stop:
                    break
                ids.append(token)
                text = self._tokenizer.decode(ids)
                if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                    yield text[len(shown) :]
                    shown = text
        yield self._tokenizer.decode(ids)[len(shown) :]

    def _cached(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        """New ids of one prompt, up to and including a stop token."""
        cache: Any = DynamicCache(config=self._model.base.config)
        step = torch.tensor([prompt], device=self._model.device_kind)
        for _ in range(max_new_tokens):
            out = self._model.network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            yield token
            if token in self._tokenizer.stop:
                return
            step = torch.tensor([[token]], device=self._model.device_kind)

    def _uncached(
        self, prompt: list[int], max_new_tokens: int, row: int = 0, choose: Chooser = likeliest
    ) -> Iterator[int]:
        """The same, all of it computed again for each token."""
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens:
            step = torch.tensor([ids], device=self._model.device_kind)
            logits_BV = self._model.network(input_ids=step, use_cache=False).logits[:, -1]
            ids += choose(logits_BV, [row], len(ids) - len(prompt))
            yield ids[-1]
            if ids[-1] in self._tokenizer.stop:
                return

    def _room(self, prompt: Sequence[int], wanted: int) -> int:
        """New tokens for which there are positions, at most `wanted`: a table of positions cannot be read past its end."""
        positions = getattr(self._model.base.config.get_text_config(), "max_position_embeddings", None)
        return max(0, min(wanted, positions - len(prompt))) if isinstance(positions, int) and positions > 0 else wanted

    def _caches(self) -> bool:
        """Whether the model takes the cache that it is given; pure Mamba classes leave `past_key_values` unread."""
        return "past_key_values" in inspect.signature(self._model.base.forward).parameters

    def _holds_keys_alone(self) -> bool:
        """Whether padding may stand between a shared prefix and the rest: not where a sliding window counts places in the cache,
        nor where a state runs from token to token."""
        cache: DynamicCache = DynamicCache(config=self._model.base.config)
        return all(type(layer) is DynamicLayer for layer in cache.layers)

    def _prefill(self, ids: list[int]) -> DynamicCache:
        cache: DynamicCache = DynamicCache(config=self._model.base.config)
        step = torch.tensor([ids], device=self._model.device_kind)
        self._model.network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _decode(
        self,
        prompts: list[list[int]],
        numbers: list[int],
        shared: int,
        start: DynamicCache | None,
        max_new_tokens: int,
        alive: Callable[[], None],
        choose: Chooser,
    ) -> list[list[int]]:
        """New ids of each prompt, its stop token included where it came."""
        device = self._model.device_kind
        rests = [p[shared:] for p in prompts]
        width = max(len(r) for r in rests)
        pad = self._tokenizer.eos
        step = torch.tensor([[pad] * (width - len(r)) + r for r in rests], device=device)
        mask = torch.tensor([[1] * shared + [0] * (width - len(r)) + [1] * len(r) for r in rests], device=device)
        cache = self._repeated(start, len(prompts))
        made: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        rooms = [self._room(p, max_new_tokens) for p in prompts]
        for place in range(max_new_tokens):
            alive()
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = self._model.network(
                input_ids=step,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = choose(out.logits[:, -1], [numbers[row] for row in active], place)
            going = []
            for k, (row, token) in enumerate(zip(active, tokens, strict=True)):
                made[row].append(token)
                if token not in self._tokenizer.stop and place + 1 < rooms[row]:
                    going.append(k)
            if not going:
                break
            if len(going) < len(active):  # rows that are done leave the batch
                kept = torch.tensor(going, device=device)
                cache.reorder_cache(kept)  # `batch_select_indices` forgets states
                mask = mask[kept]
                active = [active[k] for k in going]
            step = torch.tensor([[tokens[k]] for k in going], device=device)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
        return made

    def _repeated(self, start: DynamicCache | None, times: int) -> DynamicCache:
        cache: DynamicCache = DynamicCache(config=self._model.base.config)
        if start is not None:
            for layer, source in enumerate(start.layers):
                keys: Tensor = source.keys.expand(times, -1, -1, -1)
                values: Tensor = source.values.expand(times, -1, -1, -1)
                cache.update(keys, values, layer)
        return cache

    def _as_answer(self, ids: list[int]) -> Answer:
        stopped = bool(ids) and ids[-1] in self._tokenizer.stop
        text = self._tokenizer.decode(ids[:-1] if stopped else ids)
        return Answer(text=text, num_tokens=len(ids), stopped=stopped, ids=tuple(ids))


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Ids all prompts begin with; each keeps at least one of its own."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    same = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, min(len(p) for p in prompts) - 1)


def _batches(prompts: Sequence[list[int]], shared: int, new: int, wanted: Sequence[int]) -> Iterator[list[int]]:
    """Prompts of like length together, each batch within the memory bound."""
    batch: list[int] = []
    for i in sorted(wanted, key=lambda i: (-len(prompts[i]), i)):
        widest = len(prompts[batch[0]]) if batch else len(prompts[i])
        if batch and (len(batch) + 1) * (widest - shared + new) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
