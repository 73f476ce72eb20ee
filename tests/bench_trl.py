"""TRL's own preparation of a data set, timed: what educe's `prepare` is measured against.

.venv/bin/python tests/bench_trl.py ../shared/data/instruct/alpaca_5000.json ../shared/data/tokenizers/smollm2 50000 1
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Row = dict[str, list[dict[str, str]]]


def alpaca_rows(file: Path, num_rows: int) -> list[Row]:
    """`num_rows` distinct conversations from Alpaca rows: the instruction of one with the output of another."""
    source = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for k in range(num_rows):
        asked, answered = source[k % len(source)], source[(k + k // len(source) * 37) % len(source)]
        user = asked["instruction"] + (f"\n\n{asked['input']}" if asked["input"] else "")
        rows.append(
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answered["output"]}]}
        )
    return rows


def prepare_with_trl(rows: list[Row], tokenizer_dir: Path, num_proc: int) -> tuple[float, int]:
    """Seconds that `SFTTrainer._prepare_dataset` takes for `rows`, and the rows it leaves.

    That is all of TRL's work between a data set and its collator: chat template with assistant masks, tokenization, labels,
    truncation, dropping rows that train nothing; every setting is TRL's default but `assistant_only_loss`. Not timed: imports, the
    trainer (of a tiny random model, so that nothing is downloaded), writing the rows as Arrow. The cache is fresh: every step is done.
    The template is the ChatML one that TRL ships for training: it adds tags only to templates it knows, SmolLM2's is not one.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import qwen2_5_training_chat_template

    datasets.disable_progress_bars()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = qwen2_5_training_chat_template
    size = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "rows.jsonl")
        file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        data: Any = datasets.load_dataset("json", data_files=str(file), cache_dir=place, split="train")
        config = SFTConfig(
            output_dir=place,
            assistant_only_loss=True,
            dataset_num_proc=num_proc,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer: Any = SFTTrainer(
            model=LlamaForCausalLM(size), args=config, train_dataset=data.select([0]), processing_class=tokenizer
        )
        start = time.perf_counter()
        prepared = trainer._prepare_dataset(data, tokenizer, config, False, None, "train")
        return time.perf_counter() - start, len(prepared)


if __name__ == "__main__":
    alpaca, tokenizer_dir, num_rows, num_proc = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    seconds, left = prepare_with_trl(alpaca_rows(alpaca, num_rows), tokenizer_dir, num_proc)
    print(f"TRL, {num_proc} process(es): {left:,} rows in {seconds:.1f} s, {left / seconds:,.0f} rows/s")
