"""educe beside TRL's DPOTrainer: the same model, the same ids, the same optimizer in fp32, and the loss of each of ten steps.

TRL renders the prompt with a generation prompt and the whole conversation, and trains all that the second has beyond the first: the
answer, its stop token, and what the template writes behind that (ChatML: a newline, which nobody says). educe ends at the stop
token. So what is fed here are the ids and masks of TRL's own batches.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
from educe.config import Full  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.preference.loss import PreferenceLoss  # noqa: E402
from educe.preference.losses import LOSSES  # noqa: E402
from educe.preference.reference import reference_log_p  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.state import State  # noqa: E402
from educe.types import Example  # noqa: E402

from test_choices import CACHED  # noqa: E402
from test_engine import cpu  # noqa: E402

Pairs = list[tuple[Example, Example]]
STEPS = 10
# TRL's name of a loss, and its settings.
SAME: dict[str, tuple[PreferenceLoss, dict[str, Any]]] = {
    "dpo": (PreferenceLoss(compare=LOSSES["dpo"](beta=0.1)), {"loss_type": ["sigmoid"], "beta": 0.1}),
    "per token": (
        PreferenceLoss(compare=LOSSES["dpo"](beta=5.0, per_token=True)),
        {"loss_type": ["sigmoid_norm"], "beta": 5.0},
    ),
    "ipo": (PreferenceLoss(compare=LOSSES["ipo"](beta=0.5)), {"loss_type": ["ipo"], "beta": 0.5}),
}


def rows_of(file: Path, number: int, most_letters: int) -> list[dict[str, Any]]:
    """The first short pairs of the file, as TRL wants them."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def message(m: dict[str, str]) -> dict[str, str]:
        return {"role": roles[m["from"]], "content": m["value"]}

    rows = [
        {
            "prompt": [message(m) for m in row["conversations"]],
            "chosen": [message(row["chosen"])],
            "rejected": [message(row["rejected"])],
        }
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]
    return [r for r in rows if sum(len(m["content"]) for part in r.values() for m in part) < most_letters][:number]


def trl_steps(
    model_dir: Path,
    tokenizer_dir: Path,
    rows: list[dict[str, Any]],
    pairs_a_step: int,
    rate: float,
    place: Path,
    how: Any,
) -> tuple[list[float], list[Pairs], Any]:
    """The loss of each step, the pairs it was made of, and the trainer."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    losses: list[float] = []
    batches: list[Pairs] = []

    class Recording(DPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super()._compute_loss(model, inputs, *args, **kwargs)
            losses.append(loss.item())
            batches.append(pairs_of(inputs))
            return loss

    config = DPOConfig(
        output_dir=str(place),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=pairs_a_step,
        max_steps=STEPS,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **how,
    )
    network, reference = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    trainer = Recording(
        model=network,
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_dir),
    )
    trainer.train()
    return losses, batches, trainer


def pairs_of(inputs: Any) -> Pairs:
    examples = []
    for ids, there, trained in zip(
        *(inputs[x] for x in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        weights = trained[there.bool()].numpy().astype(np.float32)
        examples.append(Example(ids_T=ids[there.bool()].numpy().astype(np.int32), weights_T=weights))
    half = len(examples) // 2
    return list(zip(examples[:half], examples[half:], strict=True))


def our_steps(model_dir: Path, batches: list[Pairs], rate: float, loss: PreferenceLoss) -> list[float]:
    model = load_model(model_dir, cpu(), Full(kind="full"))
    steps = [[e for pair in pairs for e in pair] for pairs in batches]
    found = iter(reference_log_p(model, map(build_batch, steps)).tolist())
    known = [[replace(e, reference=next(found)) for e in step] for step in steps]
    losses: list[float] = []
    config = LoopConfig(
        total_steps=STEPS, learning_rate=rate, warmup_share=0.0, schedule="constant", clip_norm=1.0, seed=0
    )
    state = State(model=model, optimizer=Adam(model.trainable(), AdamSettings(betas=(0.9, 0.999))))
    train(state, lambda s: [build_batch(known[s])], loss, [lambda _, report: losses.append(report.loss)], config)
    return losses


@pytest.mark.parametrize("kind", SAME)
def test_ten_steps_have_trls_losses(tiny_model: Path, shared: Path, tmp_path: Path, kind: str) -> None:
    loss, how = SAME[kind]
    rows = rows_of(shared / "preference" / "dpo_en_demo.json", 20, 900)
    theirs, batches, trainer = trl_steps(tiny_model, tiny_model, rows, 2, 3e-3, tmp_path, how)
    assert len(rows) == 20
    assert len(theirs) == STEPS
    assert max(abs(a - theirs[0]) for a in theirs) > 0.05  # it moves: else sameness would say little
    same(our_steps(tiny_model, batches, 3e-3, loss), theirs)
    if kind == "dpo":
        ends_behind_the_stop_token(trainer, batches)


def same(ours: list[float], theirs: list[float]) -> None:
    apart = np.abs(np.subtract(ours, theirs)).max()
    print(f"\n{theirs[0]:.4f} to {theirs[-1]:.4f}, apart {apart:.1e}")
    assert apart < 1e-4


def ends_behind_the_stop_token(trainer: Any, batches: list[Pairs]) -> None:
    """What TRL trains last: ChatML's newline. Were it otherwise, what this file says of TRL would be wrong."""
    said = trainer.processing_class
    for chosen, _ in batches[0]:
        assert said.decode(chosen.ids_T[-2:]) == "<|im_end|>\n"
        assert said.decode(chosen.ids_T[chosen.weights_T == 0]).endswith("<|im_start|>assistant\n")


@pytest.mark.slow
def test_ten_steps_of_smollm2_have_trls_losses(shared: Path, smollm2_tokenizer_dir: Path, tmp_path: Path) -> None:
    if not CACHED.is_dir():
        pytest.skip("needs SmolLM2-135M-Instruct in the cache")
    loss, how = SAME["dpo"]
    rows = rows_of(shared / "preference" / "dpo_en_demo.json", 10, 1200)
    theirs, batches, _ = trl_steps(CACHED, smollm2_tokenizer_dir, rows, 1, 1e-6, tmp_path, how)
    same(our_steps(CACHED, batches, 1e-6, loss), theirs)
