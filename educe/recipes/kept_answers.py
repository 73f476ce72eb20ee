"""A model's answers, kept in the cache as they come: a process that is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from educe.chat.tokens import ChatTokenizer
from educe.files.hashes import hash_json
from educe.model.device import Device
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.arithmetic import arithmetic_of
from educe.recipes.kept_replies import Keep, KeptReplies
from educe.sample.draw import chooser_of
from educe.sample.local import LocalSampler
from educe.types import Answer, Sampling

OnAnswers = Callable[[str, int, int], None]


class KeptAnswers:
    """One model's, which is loaded where an answer is missing."""

    def __init__(self, model: Callable[[], CausalLM], of: Any, tokenizer: ChatTokenizer, say: Say) -> None:
        """`of` holds all that answers depend on but the prompts and how they are drawn."""
        self._model, self.of, self._tokenizer, self.replies = model, of, tokenizer, KeptReplies(of, say)

    def answer(
        self,
        name: str,
        ids: Sequence[list[int]],
        sampling: Sampling,
        on_answers: OnAnswers = lambda name, done, total: None,
        draws: Sequence[str] = (),
    ) -> tuple[list[Answer], float]:
        """To prompts of ids, and the seconds that took, those of the cache when it was made. `draws` names each prompt for what is
        drawn, where anything is. Another process that asks the same model waits."""
        draws = draws if sampling.temperature > 0 else [""] * len(ids)
        keys = [hash_json([i, d, asdict(sampling)])[:24] for i, d in zip(ids, draws, strict=True)]
        loaded: list[LocalSampler] = []

        def ask(places: Sequence[int], keep: Keep) -> None:
            done = len(ids) - len(places)

            def told(batch: Sequence[int], answers: Sequence[Answer]) -> None:
                nonlocal done
                done += len(batch)
                keep(batch, [asdict(a) for a in answers])
                on_answers(name, done, len(ids))

            choose = chooser_of(sampling, draws)
            loaded[0].answer_some(places, ids, sampling.max_new_tokens, told, choose=choose)

        def ready() -> None:
            loaded.append(LocalSampler(self._model(), self._tokenizer, name))

        before = self.replies.seconds
        replies = self.replies.replies(name, keys, ask, ready)
        return [Answer(**r | {"ids": tuple(r["ids"])}) for r in replies], self.replies.seconds - before


def answers_depend_on(tokenizer: ChatTokenizer, device: Device) -> list[Any]:
    """What answers depend on besides weights, prompts and how they are drawn."""
    return [sorted(tokenizer.stop), tokenizer.tokenizer_hash, *arithmetic_of(device)]
