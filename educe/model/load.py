"""Load a causal language model for training or answering, and the few things about it that the engine needs.

Shape legend: P tokens of a packed row, N trained positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationMixin

from educe.config import Full, Lora
from educe.errors import MachineError, ModelError
from educe.model import attention
from educe.model.adapters import layer_embeddings, with_adapters
from educe.model.describe import refuse_unsafe
from educe.model.device import Device
from educe.model.documents import documents_of
from educe.model.four_bit import four_bits, keep_gradients
from educe.model.frugal import as_written, compile_layers, on_host, recompute_layers, uncompiled
from educe.model.loaded import prove_loaded
from educe.model.mixers import run_apart
from educe.model.router import balance_loss, router_coefficient
from educe.parallel.shard import Sharded, layers_of
from educe.parallel.world import World
from educe.types import Batch

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """What one forward gives. `router_loss`: the micro-batch's auxiliary loss of routing, times its coefficient; None where the
    model has none, none is asked for, or nothing is trained."""

    states_PD: Float[Tensor, "p d"]
    router_loss: Float[Tensor, ""] | None


class CausalLM:
    """A loaded model: `network` is what transformers (and peft) made; weights are in the device's arithmetic.

    `packable` is False once `packs_are_blind` has found a leak: then rows must hold one document, and nothing is put beside it.
    """

    def __init__(self, network: Any, device: Device, *, adapted: bool, router_loss: float | None = None) -> None:
        self.network = network
        self.device = device
        self.base = network.get_base_model() if adapted else network
        self.packable = True
        self.why_unpacked = ""
        self.router_coefficient = router_coefficient(self.base, router_loss)
        self._decoder: nn.Module = self.base.get_decoder()
        self.sharded: Sharded | None = None
        self.offloads = False
        self._row_tokens = 0  # of compiled layers
        with torch.no_grad():  # peft puts a matrix with trained rows together each time it is asked for one
            self.vocabulary = int(self.base.get_output_embeddings().weight.shape[0])

    @property
    def device_kind(self) -> str:
        return self.device.kind

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name; a tied parameter once."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def hidden_states(self, batch: Batch) -> Float[Tensor, "p d"]:
        """Last hidden states of a packed row; its documents do not see each other."""
        return self.forward(batch).states_PD

    def forward(self, batch: Batch) -> Hidden:
        """Last hidden states of a packed row, whose documents do not see each other, and the auxiliary loss of its routing.

        Filler documents, none longer than the longest of the row, bring rows to few lengths, see `_filler`; nothing of them is
        returned. (Longer ones would have positions that the row has not, and some models turn all positions by the largest.)
        """
        filler = documents_within(self._filler(batch.num_tokens), int(batch.lengths_D.max()))
        filled = sum(filler)
        balancing = self.router_coefficient > 0 and self.network.training
        out = self._decoder(
            input_ids=self.tensor(np.pad(batch.ids_P, (0, filled)))[None],
            position_ids=self.tensor(np.concatenate([batch.positions_P, *map(np.arange, filler)]))[None],
            documents=documents_of([*batch.lengths_D.tolist(), *filler], self.device_kind),
            use_cache=False,
            **({"output_router_logits": True} if balancing else {}),
        )
        states: Tensor = out.last_hidden_state[0]
        loss = None
        if balancing:
            config = self.base.config.get_text_config()
            loss = self.router_coefficient * balance_loss(out.router_logits, config, batch.num_tokens)
        return Hidden(states_PD=states[: batch.num_tokens], router_loss=loss)

    def _filler(self, num_tokens: int) -> int:
        """Tokens of a filler document: up to the lengths that compiled layers know; else, on a CPU, up to a multiple of 16, since
        oneDNN compiles and keeps kernels for every shape it meets (docs/decisions/004)."""
        if self._row_tokens and self.network.training:
            return -num_tokens % self._row_tokens
        return -num_tokens % 16 if self.device_kind == "cpu" and self.packable else 0

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, first to last."""
        return layers_of(self._decoder)

    def recompute(self, count: int) -> None:
        """The first `count` layers are computed again in the backward pass."""
        recompute_layers(self.layers, count)

    def compile(self, row_tokens: int) -> None:
        """Compile the layers for rows of `row_tokens`; others are filled up to a multiple of it."""
        compile_layers(self.layers)
        self._row_tokens = row_tokens

    def uncompile(self) -> None:
        """Layers run as they are written from here on."""
        as_written(self.layers)
        self._row_tokens = 0

    def fill_less(self, row_tokens: int) -> None:
        """Compiled layers get rows of any multiple of `row_tokens` from here on, where those were longer."""
        self._row_tokens = min(self._row_tokens, row_tokens)

    def head(self, hidden_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits as the model computes them: scale and soft cap of its config included."""
        config = self.base.config.get_text_config()
        logits: Tensor = self.base.get_output_embeddings()(
            hidden_ND.to(self.device.torch_dtype)
        )  # some keep fp32 residuals
        for scale in (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")):
            if scale:
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
        was_training = self.network.training
        self.network.eval()  # no dropout: it is what answers would be like
        try:
            with self.network.disable_adapter():
                yield
        finally:
            self.network.train(was_training)

    @contextlib.contextmanager
    def gradients(self, *, synchronised: bool) -> Iterator[None]:
        """A forward and backward pass; ranks add up their gradients only where it is `synchronised`."""
        if self.sharded is not None:
            self.sharded.synchronise(synchronised)
        with on_host(self.network) if self.offloads else contextlib.nullcontext():
            yield

    def shard(self, world: World) -> None:
        """Divide the weights over the ranks, for good; `trainable` then names the shards. From here on the model computes only within
        `whole`, on all ranks alike."""
        dtype = self.device.torch_dtype
        self.sharded = Sharded(self.network, self._decoder, dtype, self.device.kind, world)

    def whole(self, compute: Callable[[], T]) -> T:
        """`compute()`, with the weights that it needs in place. A backward pass may begin at `.loss` of what it returns."""
        return compute() if self.sharded is None else self.sharded.run(compute)

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
    def measuring(self) -> Iterator[None]:
        """As it would answer, for the time of the block: no dropout, and layers as they are written."""
        was_training = self.network.training
        self.network.eval()
        try:
            with uncompiled():
                yield
        finally:
            self.network.train(was_training)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """`measuring` with cached, padded attention."""
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation(attention.answers_with(type(self.base), self.base.config))
        try:
            # FSDP's memory outlives the block
            with torch.inference_mode() if self.sharded is None else torch.no_grad(), self.measuring():
                yield
        finally:
            self.base.set_attn_implementation(before)


def documents_within(num_tokens: int, longest: int) -> list[int]:
    """`num_tokens` in documents of at most `longest`."""
    whole, rest = divmod(num_tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def load_model(
    directory: Path,
    device: Device,
    tuning: Full | Lora | None = None,
    *,
    new_ids: Collection[int] = (),
    router_loss: float | None = None,
) -> CausalLM:
    """Load in the device's arithmetic. With `tuning`, ready to train packed rows; without, ready to answer.

    Nothing in the directory is executed. With LoRA the adapters are on every linear layer and the rest is frozen, but for the
    embeddings of `new_ids`: tokens that the model never saw, which begin as the mean of the others. Of a model that also takes
    images or sound only the language model is trained; the rest is loaded, kept as it is and exported. `router_loss`: the
    coefficient of the auxiliary loss of a mixture of experts; None leaves it to the model's config.
    """
    refuse_unsafe(directory)
    attention.register()
    with quiet():
        low = isinstance(tuning, Lora) and tuning.base_bits == 4
        network = _read(directory, device, for_training=tuning is not None, low=low)
        if new_ids:
            _begin_rows(network, sorted(new_ids))
    network.to(device.kind)
    if tuning is not None:
        _freeze_towers(network)
        run_apart(network.get_decoder())
    if isinstance(tuning, Lora):
        with quiet():
            network = with_adapters(network, tuning, sorted(new_ids))
    model = CausalLM(network, device, adapted=isinstance(tuning, Lora), router_loss=router_loss)
    if tuning is None:
        network.eval()
        return model
    network.train()
    return model


def _read(directory: Path, device: Device, *, for_training: bool, low: bool) -> Any:
    """The checkpoint's own class with the checkpoint's weights, all of them; `low`: linear layers in 4 bits."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        maker = _class_of(config)
        unpacked = _unpacking(config, directory)
        if low and unpacked:
            found = "has packed experts (mxfp4), and those cannot be unpacked while other weights are packed."
            raise ModelError(204, str(directory / "config.json"), found, "Set tuning.base_bits: 16.")
        packed = four_bits(maker, config, device.torch_dtype) if low else {}
        way = attention.NAME if for_training else attention.answers_with(maker, config)
        network, info = maker.from_pretrained(
            directory,
            config=config,
            dtype=device.torch_dtype,
            attn_implementation=way,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **unpacked,
            **packed,
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as e:
        if "out of memory" in str(e):
            fix = "Choose a smaller model or another device."
            raise MachineError(3, str(directory), "does not fit the device's memory.", fix) from e
        first = str(e).strip().splitlines()[0][:200]
        raise ModelError(2, str(directory), f"transformers cannot load it: {first}", "Check the files.") from e
    prove_loaded(network, info["missing_keys"], directory, packed=low)
    keep_gradients(network)
    if unpacked:
        network._weight_conversions = None  # else transformers would save plain numbers under the names of packed ones
    return network


def _unpacking(config: Any, directory: Path) -> dict[str, Any]:
    """What makes plain numbers of packed 4-bit ones (gpt-oss is published so; they are then trained and exported as such).
    Raises `ModelError` for every other quantization."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return {}
    method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    if method != "mxfp4":
        found = f"is quantized ({method}): its weights are no plain numbers, which training needs."
        raise ModelError(204, str(directory / "config.json"), found, "Use the model that it was made from.")
    return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}


def _class_of(config: Any) -> Any:
    """The class that the checkpoint names, so that all of it is loaded and exported; `AutoModelForCausalLM` would take the text
    half of some checkpoints that also take images. Raises ValueError where there is none."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, GenerationMixin) and not config.is_encoder_decoder:
        return named
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is no causal language model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _freeze_towers(network: Any) -> None:
    """Train the language model and its head only."""
    trained = {id(p) for part in (network.get_decoder(), network.get_output_embeddings()) for p in part.parameters()}
    for p in network.parameters():
        p.requires_grad_(id(p) in trained and p.is_floating_point())


def _begin_rows(network: Any, new_ids: list[int]) -> None:
    """Let the rows of `new_ids` in embeddings and head (and its bias) be the mean of the rows before them.

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
    per_layer = [e.weight for e in layer_embeddings(network).values()]
    with torch.no_grad():
        for rows in (embedding.weight, None if tied else head.weight, getattr(head, "bias", None), *per_layer):
            if rows is not None:
                rows[[k for k in begun if k < len(rows)]] = _mean(rows[: min(new_ids[0], before)]).to(rows.dtype)


def _mean(rows: Tensor) -> Tensor:
    """Mean over the first dimension, added up in fp64 in pieces: no copy of a whole embedding, no doubt about the last bit."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for piece in rows.split(4096):
        total += piece.double().sum(0)
    return total / len(rows)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or advice from transformers, nor torchao's on what it lacks, on the terminal; errors still raise."""
    level, disabled = logging.getLogger("transformers").level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        logging.getLogger("transformers").setLevel(level)
