"""WebShop's search: Lucene's terms, scores and order, against recorded cases where they lie beside the project."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.webshop import analyzer, search
from envs.webshop.analyzer import analyze, tokens
from envs.webshop.search import Index, TooManyTermsError, byte_length, length_byte, open_index

RECORDED = Path(__file__).parents[2] / "shared" / "webshop"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded WebShop cases are not beside the project")


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (RECORDED / name).read_text("utf-8").splitlines()]


@recorded
def test_terms_are_lucenes_on_every_recorded_text():
    cases = lines("analyzer_golden.jsonl")
    assert len(cases) == 800
    assert [analyze(text) for text, _ in cases] == [terms for _, terms in cases]


@recorded
def test_stems_are_lucenes_on_every_recorded_word():
    pairs = [line.split("\t") for line in (RECORDED / "stem_golden.tsv").read_text("utf-8").splitlines()]
    assert len(pairs) == 8000
    assert [analyzer._stemmer()(word) for word, _ in pairs] == [stem for _, stem in pairs]


@recorded
def test_order_and_scores_are_lucenes_on_every_recorded_query(tmp_path: Path):
    products = lines("products_main.jsonl")
    index = open_index(tmp_path / "index", "main", lambda: ((p["asin"], search.document_of(p)) for p in products))
    cases = lines("search_golden.jsonl")
    assert len(cases) == 120
    for case in cases:
        hits = index.search(case["query"])
        assert [hit.asin for hit in hits] == [asin for asin, _ in case["hits"]], case["query"]
        # as recorded they are rounded to four places, and equal ones then set apart by 1e-6
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in case["hits"]], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title:lamp o'neill U.S.A. a_b __", ["title:lamp", "o'neill", "U.S.A", "a_b"]),
        ("1,000 3.5 12:30 12/30 a-b&c+d#e@f", ["1,000", "3.5", "12", "30", "12", "30", *"abcdef"]),
        ("12pro 5a.b x,y don\u2019t", ["12pro", "5a.b", "x", "y", "don\u2019t"]),
        ("★ ☆ ● ✅ ™ ® ½ ²", ["★", "✅", "™", "®"]),
        ("小米 アイ ひら 한국어 ไทย", ["小", "米", "アイ", "ひ", "ら", "한국어", "ไทย"]),
        ("👍🏽 🎉🏽 👩‍⚕️ 🇩🇪 #️⃣", ["👍🏽", "🎉", "🏽", "👩‍⚕️", "🇩🇪", "#️⃣"]),
        ("x" * 300, ["x" * 255, "x" * 45]),
        ("", []),
    ],
)
def test_tokens(text: str, words: list[str]):
    assert tokens(text) == words


def test_both_patterns_agree_on_ascii():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(rng.choice(list("ab1_.:;,'\"- #*"), 12))
        assert analyzer._ASCII_TOKEN.findall(text) == analyzer._TOKEN.findall(text), text


def test_terms_lose_possessives_then_capitals_then_stop_words():
    assert analyze("The Women's O'Neill\u2019S THAT'S the's running of s") == ["women", "o'neil", "run", "s"]
    assert len(analyzer.STOP_WORDS) == 33
    assert analyze("İΣ") == ["i\u03c3"]  # letter by letter, as Java does: no dot of its own, no final sigma


def test_length_byte():
    assert [byte_length(length_byte(length)) for length in range(41)] == list(range(41))
    assert [byte_length(length_byte(length)) for length in (41, 42, 55, 56, 59, 60, 113, 1000)] == [
        *(40, 42, 54, 56, 56, 60, 112, 984)
    ]
    assert [length_byte(byte_length(byte)) for byte in range(256)] == list(range(256))


Opener = Callable[..., Index]


@pytest.fixture
def index_of(tmp_path: Path) -> Opener:
    def opened(documents: Iterable[tuple[str, str]], digest: str = "d", processes: int = 1) -> Index:
        return open_index(tmp_path / "index", digest, lambda: documents, processes=processes)

    return opened


def test_a_score_worked_by_hand(index_of: Opener):
    index = index_of([("A", "lamp lamp desk"), ("B", "desk chair"), ("C", "the of"), ("D", "sofa")])
    # C has no term: 3 documents of 2 terms on average
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * 3 / 2))
    assert [(hit.asin, pytest.approx(expected)) for hit in index.search("lamps")] == [("A", pytest.approx(expected))]
    [hit] = index.search("lamp lamp lamp")
    assert hit.score == pytest.approx(3 * expected)
    assert hit.score == float(np.float32(hit.score))
    assert [hit.asin for hit in index.search("sofa desk")] == ["D", "B", "A"]


def test_equal_scores_are_ordered_by_asin_and_others_left_out(index_of: Opener):
    index = index_of([(f"B{number:03}", "red lamp" if number % 2 else "blue chair") for number in reversed(range(400))])
    assert [hit.asin for hit in index.search("lamp")] == [f"B{number:03}" for number in range(1, 100, 2)]
    assert len(index.search("lamp", 1000)) == 200
    assert len(index.search("lamp chair", 1000)) == 400
    assert index.search("the") == index.search("") == index.search("unheard") == index.search("lamp", 0) == []


def test_best_is_what_sorting_gives():
    rng = np.random.default_rng(0)
    for size in (1, 7, 50, 2500, 10_007):
        scores = np.maximum(rng.integers(-20, 40, size), 0).astype(np.float32)
        ranked = sorted(np.flatnonzero(scores), key=lambda at: (-scores[at], at))
        for k in (1, 50, 3000):
            assert list(search._best(scores, k)) == ranked[:k]


def test_too_many_terms(index_of: Opener):
    index = index_of([("A", "w1")])
    assert index.search(" ".join(f"w{number}" for number in range(1024)))[0].asin == "A"
    with pytest.raises(TooManyTermsError, match="1025 distinct terms; 1024"):
        index.search(" ".join(f"w{number}" for number in range(1025)))


def test_processes_and_batches_change_nothing(index_of: Opener, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    documents = [(f"B{number:04}", " ".join(rng.choice(list("abcdefgh"), 20))) for number in range(4500)]
    alone = index_of(documents, "1").search("c d e f", 200)
    monkeypatch.setattr(search, "_BATCH", 10)
    assert index_of(documents, "2", processes=2).search("c d e f", 200) == alone


def test_an_index_is_kept_until_its_catalogue_changes(index_of: Opener, caplog: pytest.LogCaptureFixture):
    index_of([("A", "lamp")], "one")
    assert [hit.asin for hit in index_of([("B", "lamp")], "one").search("lamp")] == ["A"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [hit.asin for hit in index_of([("B", "lamp")], "two").search("lamp")] == ["B"]
    assert "made again: it was made with another catalogue" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "deleted", "manifest"])
def test_a_damaged_index_is_built_again(
    damage: str, index_of: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    index_of([("A", "lamp")])
    file = tmp_path / "index" / ("manifest.json" if damage == "manifest" else "codes.npy")
    file.write_bytes(file.read_bytes()[:-3])
    if damage == "deleted":
        file.unlink()
    assert [hit.asin for hit in index_of([("A", "lamp")]).search("lamp")] == ["A"]
    assert "made again" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.lock"]


def test_documents_that_cannot_be_indexed(index_of: Opener, tmp_path: Path):
    with pytest.raises(ValueError, match="asin A"):
        index_of([("A", "lamp"), ("B", ""), ("A", "chair")])
    with pytest.raises(ValueError, match="there are none"):
        index_of([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.lock"]
    assert index_of([("A", "the"), ("B", "")]).search("lamp") == []


def test_document_of():
    product = {"Title": "A Lamp", "Description": "", "BulletPoints": ["Bright", "Tall"]}
    product |= {"options": {"color": ["red", "Blue"], "size": ["1"]}}
    assert search.document_of(product) == "a lamp  bright color: red, blue, and size: 1"
