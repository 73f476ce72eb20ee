"""`educe chat`: talk to a run's model, with the untouched one beside it if asked."""

from __future__ import annotations

from collections.abc import Iterator

from educe.chat.prompt import render_prompt
from educe.errors import RunError
from educe.files.run_dir import RunDir
from educe.model.device import CLOSE_OTHERS, told_of_memory
from educe.model.export import merged
from educe.model.load import load_model
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.types import Conversation, Message


class Chat:
    """A conversation with the tuned model (and the untouched one), prompted exactly as in training.

    The system message is that of the training rows when they all have the same one, else the template's own.
    """

    @told_of_memory("chat", CLOSE_OTHERS)
    def __init__(self, run: RunDir, say: Say, *, base: bool) -> None:
        recipe = recipe_of(run)
        weights = final_weights(run, say)
        self._prepared: Prepared = data_of(run, recipe, say)
        device = answering_device(recipe, run, say)
        self.names = ["tuned", "untouched"] if base else ["tuned"]
        added = self._prepared.tokenizer.new_tokens.values()
        models = {"tuned": merged(self._prepared.model_dir, weights, recipe.tuning, device, new_ids=added)}
        if base:
            models["untouched"] = load_model(self._prepared.model_dir, device, new_ids=added)
        self._samplers = {n: LocalSampler(m, self._prepared.tokenizer) for n, m in models.items()}
        self.system = common_system(self._prepared.conversations("shots"))
        self._history: dict[str, tuple[Message, ...]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        start = (Message(role="system", content=self.system),) if self.system is not None else ()
        self._history = dict.fromkeys(self.names, start)

    def ask(self, name: str, text: str, max_new_tokens: int) -> Iterator[str]:
        """Stream one model's answer and remember it."""
        if not text.strip():
            raise RunError(2, "chat", "an empty message.", "Type something.")
        messages = (*self._history[name], Message(role="user", content=text))
        prompt = render_prompt(messages, self._prepared.tokenizer)
        parts = []
        with told_of_memory("chat", CLOSE_OTHERS):
            for part in self._samplers[name].stream(prompt, max_new_tokens):
                parts.append(part)
                yield part
        self._history[name] = (*messages, Message(role="assistant", content="".join(parts)))


def common_system(rows: list[Conversation]) -> str | None:
    """The system message that all rows share, or None."""
    found = {c.messages[0].content if c.messages[0].role == "system" else None for c in rows}
    return found.pop() if len(found) == 1 else None
