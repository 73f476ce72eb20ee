"""A model from scratch: a byte-level BPE tokenizer trained on the first stage's texts, and a Llama with random weights.

Both are a pure function of the texts, the settings and the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from educe.config import Recipe, Scratch, StagedRecipe
from educe.data.reading import read_row, reading_for
from educe.data.sources import read_span, spans_of
from educe.errors import DataError, Refusal, RunError
from educe.files.atomic import MANIFEST, directory, verify
from educe.files.hashes import cache_dir, hash_file_once, hash_json
from educe.files.locks import one_at_a_time
from educe.model.source import Alive, Say
from educe.recipes.prepare import inputs_of
from educe.seeds import derive
from educe.types import Document

END = "<|endoftext|>"
# Bump when the same texts and settings would give another model.
SCRATCH_VERSION = 1


def make_scratch(staged: StagedRecipe, model: Scratch, path: Path, say: Say, alive: Alive = lambda: None) -> None:
    """The model directory `path`, made where it is not there. Raises `RunError` where it was made of other texts or settings."""
    first = staged.recipe(0, "random")
    files = [hash_file_once(f, alive) for i in inputs_of(first)[0] if i.role == "train" for f in i.files]
    read = {name: rows.model_dump(exclude={"files"}) for name, rows in first.data.sources.items()}
    key = hash_json([SCRATCH_VERSION, model.model_dump(), files, read, first.train.seed])
    with one_at_a_time(cache_dir() / "locks" / key[:24], partial(say, f"another process makes {path}: waiting for it")):
        if path.is_dir():
            manifest = verify(path)
            if isinstance(manifest, str):
                raise RunError(
                    3, str(path), f"is damaged: {manifest}", "Delete it to have it made again, with all stages."
                )
            if manifest["key"] != key:
                found = "was made of other texts, sizes or another seed than the recipe has now."
                raise RunError(
                    201,
                    str(path),
                    found,
                    f"Give the recipe another `name:`, or make all anew: --redo {staged.names[0]}.",
                )
            return
        with directory(path, about={"stage": "scratch", "key": key}, alive=alive) as place:
            say(_write(place, first, model, alive))


def is_scratch(model: Path) -> bool:
    """Whether a model directory is one that `make_scratch` made: its weights are random."""
    try:
        held = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("stage") == "scratch"


def _write(place: Path, first: Recipe, model: Scratch, alive: Alive) -> str:
    """Tokenizer, config and weights; what to say of them."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(first, alive), trainer)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"eos_token": END, "pad_token": END, "model_max_length": model.positions}
    (place / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=model.width,
        intermediate_size=_inner(model.width),
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.positions,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(first.train.seed, "scratch"))
        network = LlamaForCausalLM(config).float()
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    num = sum(p.numel() for p in weights.values())
    return (
        f"a model from scratch: {num / 1e6:.1f}M random weights, {model.layers} layers of width {model.width}; its tokenizer has "
        f"{size:,} tokens, learned from the first stage's texts"
    )


def _texts(first: Recipe, alive: Alive) -> Iterator[str]:
    """Those of the first stage that train, held-out ones among them where a share is held out."""
    num = 0
    for i in inputs_of(first)[0]:
        for file in i.files if i.role == "train" else ():
            reading = reading_for(i.reading, file, i.header)
            for span in spans_of(file, None, i.header, documents=reading.documents):
                for source, value in read_span(span):
                    alive()
                    for item in read_row(value, source, reading) if not isinstance(value, Refusal) else ():
                        if isinstance(item, Document):
                            num += 1
                            yield item.text
    if not num:
        raise DataError(5, first.data.sources[next(iter(first.data.sources))].files, "holds no text.", "Give raw text.")


def _inner(width: int) -> int:
    """Llama's: 8/3 of the width, up to a multiple of 16."""
    return -(-8 * width // 3 // 16) * 16
