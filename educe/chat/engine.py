"""Text → ids through the fastest engine that is proved, on this machine and for this tokenizer, to give what `tokenizers` gives.

The one candidate today is fastokens (`pip install educe[fast]`): 3.5 to 28 times the rows a second of `tokenizers` on two cores.
It proves itself on about 4,000 hard texts before it is used (once for a machine, a tokenizer and the versions) and on a sample of
every call after; where it is absent, cannot load the
tokenizer or differs anywhere, `tokenizers` does the work and the engine says why. Candidates that were refused, with the texts on
which they differ: docs/decisions/002-dependencies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import chain, pairwise
from typing import TypeAlias

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Tokenizer

from educe.chat.hard_texts import hard_texts
from educe.files.atomic import write_text
from educe.files.hashes import cache_dir, hash_bytes

# N ids in all, B texts: the ids of text b are ids_N[starts[b]:starts[b + 1]].
Flat: TypeAlias = tuple[Int32[np.ndarray, " N"], Int64[np.ndarray, " B+1"]]
Encoder: TypeAlias = Callable[[Sequence[str]], Flat]

# A panic in Rust arrives as a BaseException, so all are caught but these.
_NOT_ITS_FAULT = (KeyboardInterrupt, SystemExit, MemoryError)
PROOF_VERSION = 1  # bump when the hard texts change: what was proved before is then proved again
_SAMPLE = 64  # one text in so many, and one of every call, is encoded a second time by `tokenizers`
WORTH_CHARS = 10_000_000  # loading and proving takes 1 to 3 s, in which `tokenizers` encodes about so much


class EngineMismatch(Exception):
    """The engine's ids of a text are not those of `tokenizers`."""

    def __init__(self, text: str, got: list[int], want: list[int]) -> None:
        self.text, self.got, self.want = text, got, want
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        shown = repr(text) if len(text) <= 80 else f"{text[:80]!r}… ({len(text):,} characters)"
        super().__init__(f"{shown}: from id {at} on {got[at : at + 4]} where tokenizers has {want[at : at + 4]}")


class Engine:
    """Encodes texts; `name` is the package and version, `reason` why it was taken.

    `fell_back` is None, or what went wrong while running: that call and all later ones were done by `tokenizers`. Ids given out before
    it were checked in samples only, so a caller that has kept some encodes them again.
    Safe to call from several threads; the work is done without the GIL.
    """

    def __init__(self, name: str, reason: str, fast: Encoder | None, reference: Tokenizer) -> None:
        self.name = name
        self.reason = reason
        self.fell_back: str | None = None
        self._fast = fast
        self._reference = reference
        self._num_seen = 0

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The ids of each text, int32: views of one read-only array, which lives as long as any of them.

        No BOS or EOS is added; added tokens written in a text are recognised. Give many texts at once: each call checks at least one.
        """
        ids_N, starts = self.encode_flat(texts)
        return [ids_N[a:b] for a, b in pairwise(starts.tolist())]

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """As `encode`, all ids end to end and where each text starts: no object per text."""
        fast = self._fast
        if fast is None or not texts:
            return encode_reference(self._reference, texts)
        try:
            flat = fast(texts)
            _check(flat, texts, self._sample(len(texts)), self._reference)
        except _NOT_ITS_FAULT:
            raise
        except BaseException as e:
            flat = encode_reference(self._reference, texts)  # a text that no engine can encode raises here
            self._fast = None
            self.fell_back = f"{self.name} after {self._num_seen:,} texts: {_told(e)}"
        self._num_seen += len(texts)
        return flat

    def _sample(self, num_texts: int) -> Sequence[int]:
        """Every 64th text since the engine was made, and one of this call in any case."""
        every = range(-self._num_seen % _SAMPLE, num_texts, _SAMPLE)
        return every or [self._num_seen % num_texts]


def choose_engine(tokenizer_json: str, reference: Tokenizer, *, about_chars: int | None = None) -> Engine:
    """The fastest engine that gives the ids of `reference`.

    `tokenizer_json` is what `reference` was made from (truncation, padding and post-processor null). `about_chars` is how much text
    is to be encoded, if known: with less than `WORTH_CHARS`, `tokenizers` is done before another is ready.
    """
    stock = f"tokenizers {metadata.version('tokenizers')}"
    if about_chars is not None and about_chars < WORTH_CHARS:
        return Engine(stock, "so little text is encoded sooner than a faster engine is loaded", None, reference)
    try:
        name, fast = _load_fastokens(tokenizer_json)
        number = _prove(f"{name} {stock}", tokenizer_json, fast, reference)
    except ImportError:
        return Engine(stock, "fastokens is not installed: pip install 'educe[fast]'", None, reference)
    except _NOT_ITS_FAULT:
        raise
    except BaseException as e:
        return Engine(stock, f"fastokens is not used: {_told(e)}", None, reference)
    return Engine(name, f"identical to {stock} on {number:,} hard texts", fast, reference)


def _prove(versions: str, tokenizer_json: str, fast: Encoder, reference: Tokenizer) -> int:
    """How many hard texts it is proved on: now, or earlier on this machine with the same versions and tokenizer."""
    proof = cache_dir() / "engines" / f"{hash_bytes(f'{PROOF_VERSION} {versions} {tokenizer_json}'.encode())[:24]}.json"
    texts = hard_texts([t.content for _, t in sorted(reference.get_added_tokens_decoder().items())])
    if proof.is_file():  # a few again: is this what was proved?
        few = texts[:: len(texts) // 64]
        _check(fast(few), few, range(len(few)), reference)
        return len(texts)
    _check(fast(texts), texts, range(len(texts)), reference)
    write_text(proof, f"{len(texts)}\n")
    return len(texts)


def _load_fastokens(tokenizer_json: str) -> tuple[str, Encoder]:
    import fastokens

    engine = fastokens.Tokenizer.from_json_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        ids, starts = engine.encode_batch_flat(list(texts), add_special_tokens=False)
        return np.frombuffer(ids, dtype="<i4"), np.frombuffer(starts, dtype="<i8")

    return f"fastokens {metadata.version('fastokens')}", encode


def encode_reference(reference: Tokenizer, texts: Sequence[str]) -> Flat:
    lists = [e.ids for e in reference.encode_batch_fast(list(texts), add_special_tokens=False)]
    starts = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in lists], out=starts[1:])
    ids_N = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(starts[-1]))
    ids_N.flags.writeable = False
    return ids_N, starts


def _check(flat: Flat, texts: Sequence[str], sample: Sequence[int], reference: Tokenizer) -> None:
    """Raises `EngineMismatch` for the first text of the sample whose ids are not the reference's."""
    (ids_N, starts), (want_N, want_starts) = flat, encode_reference(reference, [texts[i] for i in sample])
    if len(starts) != len(texts) + 1 or starts[0] != 0 or starts[-1] != len(ids_N):
        raise ValueError(f"{len(texts)} texts came back as {len(starts) - 1}")
    for k, i in enumerate(sample):
        got, want = ids_N[starts[i] : starts[i + 1]], want_N[want_starts[k] : want_starts[k + 1]]
        if not np.array_equal(got, want):
            raise EngineMismatch(texts[i], got.tolist(), want.tolist())


def _told(error: BaseException) -> str:
    text = str(error) if isinstance(error, EngineMismatch) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
