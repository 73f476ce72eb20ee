"""Load a causal language model for training or answering, and the few things about it that the engine needs.

Shape legend: P tokens of a packed row, N trained positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from educe.config import Full, Lora
from educe.errors import MachineError, ModelError
from educe.model import attention
from educe.model.describe import refuse_unsafe
from educe.model.device import Device
from educe.model.documents import documents_of
from educe.model.frugal import compile_layers, on_host, recompute_layers, uncompiled
from educe.model.loaded import prove_loaded
from educe.types import Batch


class CausalLM:
    """A loaded model: `network` is what transformers (and peft) made; weights are in the device's arithmetic."""

    def __init__(self, network: Any, device: Device, *, adapted: bool) -> None:
        self.network = network
        self.device = device
        self.base = network.get_base_model() if adapted else network
        self._decoder: nn.Module = self.base.get_decoder()
        self.offloads = False
        self._row_tokens = 0
        with torch.no_grad():  # peft puts a matrix with trained rows together each time it is asked for one
            self.vocabulary = int(self.base.get_output_embeddings().weight.shape[0])

    @property
    def device_kind(self) -> str:
        return self.device.kind

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name; a tied parameter once."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def hidden_states(self, batch: Batch) -> Float[Tensor, "p d"]:
        """Last hidden states of a packed row; its documents do not see each other.

        A filler document brings rows to few lengths, see `_filler`; nothing of it is returned.
        """
        filler = self._filler(batch.num_tokens)
        out = self._decoder(
            input_ids=self.tensor(np.pad(batch.ids_P, (0, filler)))[None],
            position_ids=self.tensor(np.concatenate([batch.positions_P, np.arange(filler)]))[None],
            documents=documents_of(
                [*batch.lengths_D.tolist(), *([filler] if filler else [])], self.device_kind, batch.num_tokens + filler
            ),
            use_cache=False,
        )
        states: Tensor = out.last_hidden_state[0]
        return states[: batch.num_tokens]

    def _filler(self, num_tokens: int) -> int:
        """Tokens of a filler document: up to the one length that compiled layers know; else, on a CPU, up to a multiple of 16, since
        oneDNN compiles and keeps kernels for every shape it meets (docs/decisions/004)."""
        if num_tokens <= self._row_tokens:
            return self._row_tokens - num_tokens
        return -num_tokens % 16 if self.device_kind == "cpu" else 0

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        found: nn.ModuleList = self._decoder.layers
        return found

    def recompute(self, count: int) -> None:
        """The first `count` layers are computed again in the backward pass."""
        recompute_layers(self.layers, count)

    def compile(self, row_tokens: int) -> None:
        """Compile the layers for rows of `row_tokens`; shorter ones are filled up to it."""
        compile_layers(self.layers)
        self._row_tokens = row_tokens

    def head(self, hidden_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits as the model computes them: scale and soft cap of its config included."""
        config = self.base.config.get_text_config()
        logits: Tensor = self.base.get_output_embeddings()(hidden_ND)
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained tensors that `head` uses."""
        return [p for p in self.base.get_output_embeddings().parameters() if p.requires_grad]

    def base_head(self, hidden_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """`head` as it was before training."""
        with self.as_loaded():
            return self.head(hidden_ND)

    @contextlib.contextmanager
    def as_loaded(self) -> Iterator[None]:
        """The model as it was before training, for the time of the block: its adapters are off. Only with adapters."""
        if self.network is self.base:
            raise ValueError("a model without adapters does not keep what it was before training")
        with self.network.disable_adapter():
            yield

    @contextlib.contextmanager
    def gradients(self, *, synchronised: bool) -> Iterator[None]:
        """A forward and backward pass; ranks add up their gradients only where it is `synchronised`."""
        with on_host() if self.offloads else contextlib.nullcontext():
            yield

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in the model's arithmetic."""
        return int(self.device.torch_dtype.itemsize)

    def tensor(self, array: Any) -> Tensor:
        """On the device; the host does not wait for it."""
        there = torch.from_numpy(np.ascontiguousarray(array))
        if self.device_kind == "cuda":
            return there.pin_memory().to("cuda", non_blocking=True)
        return there.to(self.device.kind)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Evaluation mode with cached, padded attention, for the time of the block."""
        was_training, before = self.network.training, self.base.config._attn_implementation
        self.network.eval()
        self.base.set_attn_implementation("sdpa")
        try:
            with torch.inference_mode(), uncompiled():
                yield
        finally:
            self.base.set_attn_implementation(before)
            self.network.train(was_training)


def load_model(
    directory: Path,
    device: Device,
    tuning: Full | Lora | None = None,
    *,
    new_ids: Collection[int] = (),
) -> CausalLM:
    """Load in the device's arithmetic. With `tuning`, ready to train packed rows; without, ready to answer.

    Nothing in the directory is executed. With LoRA the adapters are on every linear layer and the rest is frozen, but for the
    embeddings of `new_ids`: tokens that the model never saw, which begin as the mean of the others.
    """
    refuse_unsafe(directory)
    attention.register()
    way = attention.NAME if tuning is not None else "sdpa"
    with quiet():
        try:
            network, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=device.torch_dtype,
                attn_implementation=way,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (ValueError, OSError, RuntimeError, KeyError) as e:
            if "out of memory" in str(e):
                fix = "Choose a smaller model or another device."
                raise MachineError(3, str(directory), "does not fit the device's memory.", fix) from e
            first = str(e).strip().splitlines()[0][:200]
            raise ModelError(2, str(directory), f"transformers cannot load it: {first}", "Check the files.") from e
        prove_loaded(network, info["missing_keys"], directory)
        if new_ids:
            _begin_rows(network, sorted(new_ids))
    network.to(device.kind)
    if isinstance(tuning, Lora):
        with quiet():
            network = _with_adapters(network, tuning, sorted(new_ids))
    model = CausalLM(network, device, adapted=isinstance(tuning, Lora))
    if tuning is None:
        network.eval()
        return model
    network.train()
    return model


def _begin_rows(network: Any, new_ids: list[int]) -> None:
    """Let the rows of `new_ids` in embedding and head (and its bias) be the mean of the rows before them.

    So a new token is neither likely nor unlikely before training (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
    Matrices that end before the last id are made longer, and the config with them. On the CPU, whatever the device: same bits.
    """
    before = int(network.get_input_embeddings().weight.shape[0])
    if new_ids[-1] >= before:
        network.resize_token_embeddings(new_ids[-1] + 1, mean_resizing=False)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if getattr(embedding, "padding_idx", None) in new_ids:
        embedding.padding_idx = None  # torch gives the row of a padding token no gradient
    begun = sorted({*new_ids, *range(before, new_ids[-1] + 1)})
    tied = head.weight is embedding.weight
    with torch.no_grad():
        for rows in (embedding.weight, None if tied else head.weight, getattr(head, "bias", None)):
            if rows is not None:
                rows[begun] = _mean(rows[: min(new_ids[0], before)]).to(rows.dtype)


def _mean(rows: Tensor) -> Tensor:
    """Mean over the first dimension, added up in fp64 in pieces: no copy of a whole embedding, no doubt about the last bit."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for piece in rows.split(4096):
        total += piece.double().sum(0)
    return total / len(rows)


def _with_adapters(network: Any, tuning: Lora, new_ids: list[int]) -> Any:
    from peft import LoraConfig, get_peft_model

    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head.weight is embedding.weight
    names = {module: name for name, module in network.named_modules()}
    holders = [names[embedding]] if tied else [names[embedding], names[head]]
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(holders, new_ids) if new_ids else None,
    )
    # Adapters in the model's arithmetic, like every other weight: the optimizer keeps fp32 masters of all it trains.
    adapted = get_peft_model(network, config, autocast_adapter_dtype=False)
    if new_ids:
        _check_rows(network, tied)
    return adapted


def _check_rows(network: Any, tied: bool) -> None:
    """The head must use the trained rows: those of the embedding where the two are tied (peft goes by the config), else its own."""
    head = network.get_output_embeddings()
    rows = getattr(head, "token_adapter", None)
    if rows is None or (rows.tied_adapter is not None) != tied:
        found = "ties its head to its embedding in a way that adapters cannot follow: new control tokens would stay untrained."
        fix = "Set tuning.kind: full, or a template whose control tokens the model has."
        raise ModelError(202, network.config.model_type, found, fix)
    if rows.base_layer.bias is not None:  # peft's layer leaves it out
        head.register_forward_hook(lambda _module, _args, logits: logits + rows.base_layer.bias)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or advice from transformers on the terminal; errors still raise."""
    level = logging.getLogger("transformers").level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
