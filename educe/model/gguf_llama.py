"""llama.cpp itself, through llama-cpp-python where that is installed: it makes K-quants, and says what it makes of a file's texts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from educe.errors import MachineError, ModelError

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
PACKAGE = "llama-cpp-python"


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def need_llama_cpp(form: str) -> None:
    """Raises `MachineError` where llama-cpp-python is not installed."""
    if not has_llama_cpp():
        fix = f"pip install {PACKAGE} (it needs a C++ compiler), or --as gguf-q8_0, which needs nothing more."
        raise MachineError(1, PACKAGE, f"is needed for {form}.", fix)


def quantize(exact: Path, file: Path, kind: str) -> str:
    """Write `file` as K-quants of the f32 or bf16 file `exact`; says which types llama.cpp chose. Raises `ModelError`."""
    cpp: Any = importlib.import_module("llama_cpp")
    _hush(cpp)
    params = cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType["MOSTLY_" + kind.upper()])
    if cpp.llama_model_quantize(str(exact).encode(), str(file).encode(), params) != 0:
        raise ModelError(206, str(file), f"llama.cpp could not make {kind} of the model.", "Use --as gguf-q8_0.")
    counts: dict[str, int] = {}
    for t in gguf.GGUFReader(file).tensors:
        counts[t.tensor_type.name] = counts.get(t.tensor_type.name, 0) + 1
    return ", ".join(f"{n} tensors in {name}" for name, n in sorted(counts.items(), key=lambda c: -c[1]))


def check_by_llama_cpp(file: Path, texts: Sequence[str], ids: Sequence[list[int]], stop: Sequence[int]) -> None:
    """llama.cpp must make `ids` of `texts`, control tokens in them taken as such, and end answers at `stop`. Raises `ModelError`."""
    cpp: Any = importlib.import_module("llama_cpp")
    _hush(cpp)
    model = cpp.Llama(model_path=str(file), vocab_only=True, verbose=False, n_ctx=8)
    for text, expected in zip(texts, ids, strict=True):
        if text and model.tokenize(text.encode(), add_bos=False, special=True) != expected:
            found = f"read by llama.cpp, it makes other ids of {text[:60]!r} than in training."
            raise ModelError(206, str(file), found, "Use --as merged.")
    vocabulary = cpp.llama_model_get_vocab(model.model)
    missed = [i for i in stop if not cpp.llama_vocab_is_eog(vocabulary, i)]
    if missed:
        raise ModelError(
            206, str(file), f"read by llama.cpp, answers do not end at the tokens {missed}.", "Report this."
        )


def _hush(cpp: Any) -> None:
    """llama.cpp writes hundreds of lines to stderr."""
    cpp.llama_log_set(_SILENT.setdefault("callback", cpp.llama_log_callback(lambda _level, _text, _data: None)), None)


_SILENT: dict[str, Any] = {}  # a callback must live as long as the library calls it
