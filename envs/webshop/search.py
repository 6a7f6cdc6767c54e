"""Ranked search with the scores of Lucene 8.11, and so its order, without Java.

The official site searches with pyserini: BM25 with Anserini's k1 = 0.9 and b = 0.4 over Lucene's English analysis. What
decides the order beyond the formula (Robertson and Zaragoza 2009) is how Lucene computes it:

- A document's length is kept in one byte (`SmallFloat.intToByte4`), exact below 40 and then in eight steps an octave.
- The score of a term is float32 at every step (`BM25Similarity.BM25Scorer.score`):
  `w - w / (1 + tf / (k1 * (1 - b + b * length / average)))`, with w = count in the query * idf.
- The terms' scores are added in float64 and rounded to float32; equal scores are ordered by the document's id.
- Documents without any term count neither as documents nor for the average length.

The index holds for each term its documents and, for each of them, a code of two bytes for the pair of term frequency
and length byte. A table gives the denominator above for every code, so a query's scores are exact whatever its counts
are, and cost one division for each pair instead of one for each document.
"""

import itertools
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from envs.processes import fresh_processes
from envs.webshop import analyzer
from envs.webshop.analyzer import analyze
from envs.webshop.store import prepare

VERSION = 1
"""To be raised with every change of the files below."""

K1, B = np.float32(0.9), np.float32(0.4)

RESULTS = 50
"""How many products the official site asks for (`SEARCH_RETURN_N`)."""

MOST_TERMS = 1024
"""Distinct terms of a query that Lucene takes (`IndexSearcher.getMaxClauseCount`)."""

CHUNK = 2000
"""Documents that are analysed at once."""

_EXACT = 24
"""Lengths below it are their own byte (255 less the code of the greatest int, 231)."""

_BATCH = 1 << 22
"""Postings after which no further term is added at once, to bound the memory."""


class TooManyTermsError(ValueError):
    """A query of more distinct terms than Lucene takes (its `TooManyClauses`)."""


class Hit(NamedTuple):
    """A product that was found."""

    asin: str
    score: float


def document_of(product: Mapping[str, Any]) -> str:
    """What of a product is searched (search_engine/convert_product_file_format.py of the official repository)."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return " ".join((product["Title"] or "", product["Description"] or "", first or "", options)).lower()


def length_byte(length: int) -> int:
    """The byte in which Lucene keeps a document's length (`SmallFloat.intToByte4`)."""
    if length < _EXACT:
        return length
    rest = length - _EXACT
    shift = max(rest.bit_length() - 4, -1)
    return _EXACT + (rest if shift < 0 else (rest >> shift & 7) | (shift + 1) << 3)


def byte_length(byte: int) -> int:
    """The length that a byte stands for (`SmallFloat.byte4ToInt`)."""
    if byte < _EXACT:
        return byte
    code, shift = byte - _EXACT & 7, (byte - _EXACT >> 3) - 1
    return _EXACT + (code if shift < 0 else (code | 8) << shift)


def idf(documents: int, containing: int) -> np.float32:
    """Lucene's inverse document frequency, ln(1 + (N - n + 0.5) / (n + 0.5))."""
    return np.float32(math.log(1 + (documents - containing + 0.5) / (containing + 0.5)))


def open_index(
    folder: Path, digest: str, documents: Callable[[], Iterable[tuple[str, str]]], *, processes: int = 1
) -> "Index":
    """The index of a catalogue, built if it is not there, is damaged or belongs to another catalogue.

    Args:
        folder: where the index lies; its reason for being built again is logged.
        digest: of the catalogue.
        documents: gives the catalogue's products as (asin, text), in any order.
        processes: how many analyse texts side by side.

    Raises:
        ValueError: two documents have the same asin, or there are none.
    """
    key = {"format": VERSION, "analyzer": analyzer.VERSION, "catalogue": digest}
    prepare(folder, key, lambda made: _build(made, documents(), processes))
    return Index(folder)


class Index:
    """A search index on disk, memory-mapped: processes share its pages. `open_index` makes them."""

    def __init__(self, folder: Path) -> None:
        self._starts = _mapped(folder / "starts.npy").data
        self._documents, self._codes = _mapped(folder / "documents.npy"), _mapped(folder / "codes.npy")
        self._denominators: NDArray[np.float32] = np.load(folder / "denominators.npy")
        self._asins = _mapped(folder / "asins.npy")
        self._with_terms = int(np.load(folder / "with_terms.npy"))
        self._terms = _Words(folder)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._asins)

    def search(self, query: str, k: int = RESULTS) -> list[Hit]:
        """The best documents that hold any term of a query, the best first, equal ones by their asins.

        Raises:
            TooManyTermsError: the query has more than 1,024 distinct terms.
        """
        counts = Counter(analyze(query))
        if len(counts) > MOST_TERMS:
            raise TooManyTermsError(f"A query of {len(counts)} distinct terms; {MOST_TERMS} are the most.")
        found = [(number, count) for term, count in counts.items() if (number := self._terms.find(term)) is not None]
        if not found or k < 1:
            return []
        scores = self._scores(found)
        return [Hit(self._asins[at].decode(), float(scores[at])) for at in _best(scores, k)]

    def _scores(self, terms: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """The score of every document, 0 where none of the terms is: [documents]."""
        sums = np.zeros(len(self), np.float64)
        first = 0
        while first < len(terms):
            size, last = 0, first
            while last < len(terms) and (last == first or size < _BATCH):
                size += self._starts[terms[last][0] + 1] - self._starts[terms[last][0]]
                last += 1
            sums += self._summed(terms[first:last], size)
            first = last
        return sums.astype(np.float32)

    def _summed(self, terms: Sequence[tuple[int, int]], size: int) -> NDArray[np.float64]:
        """The terms' scores added up by document, as a matrix [documents, terms] times ones: it is the fastest way."""
        documents, scores, ends = np.empty(size, np.int32), np.empty(size, np.float64), [0]
        for number, count in terms:
            start, end = self._starts[number], self._starts[number + 1]
            part = slice(ends[-1], ends[-1] + end - start)
            weight = np.float32(count) * idf(self._with_terms, end - start)
            by_code = (weight - weight / self._denominators).astype(np.float64)
            documents[part] = self._documents[start:end]
            by_code.take(self._codes[start:end], out=scores[part], mode="clip")
            ends.append(part.stop)
        matrix = csc_matrix((scores, documents, np.array(ends, np.int32)), shape=(len(self), len(terms)))
        return np.asarray(matrix @ np.ones(len(terms)), np.float64)


def _mapped(file: Path) -> NDArray[Any]:
    """A file's array, memory-mapped; as a plain array, of which parts are taken faster than of numpy's memmap."""
    return np.asarray(np.load(file, mmap_mode="r"))


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The places of the k greatest positive scores, the greatest first, of equal ones the first."""
    rows = len(scores) // max(math.isqrt(len(scores)), 1)
    lowest = np.float32(0)
    if rows > k:  # the k-th greatest of the parts' greatest is not above the k-th greatest of all
        greatest = scores[: len(scores) // rows * rows].reshape(rows, -1).max(axis=1)
        lowest = np.partition(greatest, rows - k)[rows - k]
    places = np.flatnonzero(scores >= lowest if lowest > 0 else scores)
    return places[np.argsort(-scores[places], kind="stable")[:k]]


class _Words:
    """The index's terms in the order of their bytes, found by bisection."""

    def __init__(self, folder: Path) -> None:
        self._ends, self._bytes = (_mapped(folder / f"{name}.npy").data for name in ("term_ends", "terms"))

    def _at(self, number: int) -> bytes:
        return bytes(self._bytes[self._ends[number - 1] if number else 0 : self._ends[number]])

    def find(self, term: str) -> int | None:
        """A term's number; None if no document holds it."""
        wanted = _encoded(term)
        number = bisect_left(range(len(self._ends)), wanted, key=self._at)
        return number if number < len(self._ends) and self._at(number) == wanted else None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can hold half a character


class _Counted(NamedTuple):
    """The terms of some documents."""

    terms: list[str]
    lengths: NDArray[np.int32]
    """Terms of each document, with repeats: [documents]."""
    distinct: NDArray[np.int32]
    """Different terms of each document: [documents]."""
    numbers: NDArray[np.int32]
    """The documents' different terms one after the other, as places in `terms`: [sum of distinct]."""
    frequencies: NDArray[np.uint16]
    """How often each is there, 65,535 at most: [sum of distinct]."""


def _count(texts: Sequence[str]) -> _Counted:
    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    lengths = np.empty(len(texts), np.int32)
    flat: list[int] = []
    for row, text in enumerate(texts):
        terms = analyze(text)
        lengths[row] = len(terms)
        flat += map(numbers.__getitem__, terms)
    size = max(len(numbers), 1)
    keys = np.repeat(np.arange(len(texts), dtype=np.int64), lengths) * size + np.array(flat, np.int64)
    pairs, frequencies = np.unique(keys, return_counts=True)
    distinct = np.bincount(pairs // size, minlength=len(texts)).astype(np.int32)
    capped = np.minimum(frequencies, np.iinfo(np.uint16).max).astype(np.uint16)
    return _Counted(list(numbers), lengths, distinct, (pairs % size).astype(np.int32), capped)


def _counted(texts: Iterable[list[str]], processes: int) -> Iterator[_Counted]:
    """The chunks' counts in their order, with never more than a few chunks in memory."""
    if processes < 2:
        yield from map(_count, texts)
        return
    with fresh_processes(processes) as pool:
        waiting = [pool.submit(_count, chunk) for chunk in itertools.islice(texts, 2 * processes)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(_count, chunk) for chunk in itertools.islice(texts, 1)]


def _build(folder: Path, documents: Iterable[tuple[str, str]], processes: int) -> None:
    asins: list[str] = []

    def texts() -> Iterator[list[str]]:
        source = iter(documents)
        while chunk := list(itertools.islice(source, CHUNK)):
            asins.extend(asin for asin, _ in chunk)
            yield [text for _, text in chunk]

    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    chunks = []
    for chunk in _counted(texts(), processes):
        of_all = np.array([numbers[term] for term in chunk.terms], np.int32)
        chunks.append(chunk._replace(terms=[], numbers=of_all[chunk.numbers]))
    if not asins:
        raise ValueError("A search index needs documents, and there are none.")
    order = _write_asins(folder, asins)
    rank = _write_terms(folder, list(numbers))
    lengths, distinct, terms, frequencies = (
        np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("lengths", "distinct", "numbers", "frequencies")
    )
    chunks.clear()
    codes = _write_denominators(folder, lengths, distinct, frequencies)
    starts = np.concatenate([[0], np.cumsum(distinct, dtype=np.int64)])
    by_document = csr_matrix((codes, rank[terms] if len(rank) else terms, starts), shape=(len(asins), len(rank)))
    by_term = by_document[order].tocsc()
    np.save(folder / "starts.npy", by_term.indptr.astype(np.int64))
    np.save(folder / "documents.npy", by_term.indices.astype(np.int32))
    np.save(folder / "codes.npy", by_term.data)


def _write_asins(folder: Path, asins: Sequence[str]) -> NDArray[np.intp]:
    """Write the asins in the order of their bytes, which becomes the documents'; returns their old places."""
    encoded = np.array([_encoded(asin) for asin in asins])
    order = np.argsort(encoded, kind="stable")
    encoded = encoded[order]
    if len(same := np.flatnonzero(encoded[1:] == encoded[:-1])):
        raise ValueError(f"Two documents have the asin {encoded[same[0]].decode()}.")
    np.save(folder / "asins.npy", encoded)
    return order


def _write_terms(folder: Path, terms: Sequence[str]) -> NDArray[np.int32]:
    """Write the terms in the order of their bytes; returns for each its place there."""
    encoded = [_encoded(term) for term in terms]
    order = sorted(range(len(encoded)), key=encoded.__getitem__)
    np.save(folder / "terms.npy", np.frombuffer(b"".join(encoded[number] for number in order), np.uint8))
    np.save(folder / "term_ends.npy", np.cumsum([len(encoded[number]) for number in order], dtype=np.int64))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank


def _write_denominators(
    folder: Path, lengths: NDArray[np.int32], distinct: NDArray[np.int32], frequencies: NDArray[np.uint16]
) -> NDArray[np.unsignedinteger[Any]]:
    """Write the table of `1 + tf / (k1 * (1 - b + b * length / average))`; returns each posting's place in it."""
    with_terms = int(np.count_nonzero(lengths))
    average = np.float32(int(lengths.sum(dtype=np.int64)) / max(with_terms, 1))
    kept = {int(length): length_byte(int(length)) for length in np.unique(lengths)}
    length_bytes = np.zeros(max(kept) + 1, np.uint8)
    length_bytes[list(kept)] = list(kept.values())
    pairs = frequencies.astype(np.uint32) << 8 | np.repeat(length_bytes[lengths], distinct)
    seen = np.zeros(1 << 24, bool)
    seen[pairs] = True
    values = np.flatnonzero(seen)
    decoded = np.array([byte_length(byte) for byte in range(256)], np.float32)
    inverse = np.float32(1) / (K1 * ((np.float32(1) - B) + B * decoded / average)) if with_terms else decoded
    np.save(folder / "denominators.npy", np.float32(1) + (values >> 8).astype(np.float32) * inverse[values & 255])
    np.save(folder / "with_terms.npy", with_terms)
    place = np.zeros(len(seen), np.uint16 if len(values) <= 1 << 16 else np.uint32)
    place[values] = np.arange(len(values), dtype=place.dtype)
    coded: NDArray[np.unsignedinteger[Any]] = place[pairs]
    return coded
