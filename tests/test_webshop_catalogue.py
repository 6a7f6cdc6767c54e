"""WebShop's catalogue: read as the official site does, against recorded products where they lie beside the project."""

import json
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envs.webshop import json_stream
from envs.webshop.catalogue import Catalogue, Sources, open_catalogue, prices_of

RECORDED = Path(__file__).parents[2] / "shared" / "webshop"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded WebShop cases are not beside the project")


@recorded
def test_products_are_the_official_sites(tmp_path: Path):
    catalogue = open_catalogue(Sources.in_folder(RECORDED / "catalogue_main"), tmp_path / "store")
    wanted = [json.loads(line) for line in (RECORDED / "products_main.jsonl").read_text("utf-8").splitlines()]
    assert catalogue.asins == [product["asin"] for product in wanted]
    assert len(wanted) == 370
    for product in wanted:
        got = catalogue[product["asin"]]
        got = {name: value for name, value in got.items() if name not in ("instruction", "instruction_attributes")}
        assert json.dumps(got) == json.dumps(product)  # the order of options, too
    assert catalogue.skipped == {"repeated": 3, "asin": 2}
    assert len(catalogue.human) == 203
    entries = json.loads((RECORDED / "catalogue_main" / "items_ins_v2_1000.json").read_text("utf-8"))
    assert set(catalogue.entries) == set(entries) & set(catalogue)
    for asin, entry in catalogue.entries.items():
        assert entry.get("instruction") == entries[asin].get("instruction")
        assert entry.get("instruction_attributes") == entries[asin].get("instruction_attributes")


def raw(asin: str = "B01", **changes: Any) -> dict[str, Any]:
    product = {"asin": asin, "name": "Lamp", "full_description": "Shines", "small_description": ["Bright"]}
    product |= {"pricing": "$9.50", "customization_options": None, "images": ["a.jpg", "b.jpg"]}
    return product | {"query": " Lamps ", "category": "home", "product_category": "Home \u203a Lamps"} | changes


Reader = Callable[..., Catalogue]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    def written(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        os.utime(path, ns=(0, zlib.crc32(path.read_bytes())))  # however quick the test is
        return path

    def opened(items: Any, entries: Any = None, human: Any = None, num_products: int | None = None) -> Catalogue:
        paths = written("items.json", items), written("entries.json", entries or {}), written("human.json", human or {})
        return open_catalogue(Sources(*paths), tmp_path / "store", num_products)

    return opened


def test_a_product(read: Reader):
    options = {
        "Color": [{"value": " Red/Blue ", "image": "r.jpg"}, {"value": "A / B"}],
        "Fit": None,
        "SIZE": [],
        "color": [{"value": "Tan", "image": None}],
    }
    entry = {"attributes": ["easy clean"], "instruction": "Find me a lamp", "instruction_attributes": ["easy clean"]}
    catalogue = read([raw(small_description="One", customization_options=options, extra=1)], {"B01": entry})
    assert catalogue["B01"] == {
        "asin": "B01",
        "Title": "Lamp",
        "Description": "Shines",
        "BulletPoints": ["One"],
        "pricing": [9.5],
        "Price": "$9.5",
        "options": {"color": ["tan"], "size": []},
        "option_to_image": {"red | blue": "r.jpg", "a  |  b": None, "tan": None},
        "Attributes": ["easy clean"],
        "MainImage": "a.jpg",
        "query": "lamps",
        "category": "home",
        "product_category": "Home \u203a Lamps",
        "Rating": "N.A.",
        "Reviews": [],
        "instruction": "Find me a lamp",
        "instruction_attributes": ["easy clean"],
    }
    assert list(catalogue["B01"]["options"]) == ["color", "size"]
    assert dict(catalogue.entries) == {"B01": entry}


@pytest.mark.parametrize(
    ("pricing", "expected"),
    [
        ("", ([100.0], "$100.0")),
        (None, ([100.0], "$100.0")),
        ("$19.00", ([19.0], "$19.0")),
        ("$1,234.50", ([1234.5], "$1234.5")),
        ("$5.00 - $9.99", ([5.0, 9.99], "$5.0 to $9.99")),
        ("$10.50 ($0.75 / Count) $3", ([10.5, 0.75], "$10.5 to $0.75")),
    ],
)
def test_prices(pricing: str | None, expected: tuple[list[float], str]):
    assert prices_of(pricing) == expected


def test_skipped_and_limited(read: Reader):
    items = [
        raw("B01"),
        raw("nan"),
        raw("B01", name="Other"),
        raw("B0123456789"),
        raw("B02"),
        raw("B03", query="sofas"),
    ]
    human = {"B02": [{"instruction": "i want a lamp"}], "B09": []}
    catalogue = read(items, {"B01": {"attributes": ["soft"]}, "B03": {}}, human)
    assert list(catalogue) == catalogue.asins == ["B01", "B02", "B03"]
    assert catalogue["B01"]["Title"] == "Lamp"
    assert catalogue.skipped == {"asin": 2, "repeated": 1}
    assert catalogue["B02"]["Attributes"] == ["DUMMY_ATTR"]
    assert dict(catalogue.entries) == {"B01": {"attributes": ["soft"]}, "B03": {"attributes": ["DUMMY_ATTR"]}}
    assert catalogue.human == human
    assert catalogue.where("query", "lamps") == ["B01", "B02"]
    assert catalogue.where("category", "home") == ["B01", "B02", "B03"]
    assert catalogue.where("category", "none") == []
    assert catalogue.where("Attributes", "soft") == ["B01"]
    assert list(catalogue.pricings()) == [("B01", [9.5]), ("B02", [9.5]), ("B03", [9.5])]

    limited = read(items, num_products=2)  # raw ones for the site, valid ones for its index
    assert limited.asins == ["B01"]
    assert [asin for asin, _ in limited.documents()] == ["B01", "B02"]
    assert "B02" not in limited
    assert limited.digest != read(items).digest
    with pytest.raises(KeyError):
        limited["B02"]


def test_a_catalogue_has_its_index_beside_it(read: Reader, tmp_path: Path):
    items = [raw("B01", name="nan lamp"), raw("nan"), raw("B02", name="Desk"), raw("B03", name="Oak lamp")]
    assert [hit.asin for hit in read(items).index().search("lamp oak")] == ["B03", "B01"]
    assert [hit.asin for hit in read(items, num_products=2).index().search("desk")] == ["B02"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "store",
        "store-search-2",
        "store-search-all",
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([raw(), {"name": "Lamp"}], r"items.json: item 2 has no asin"),
        ([raw(asin=3)], r"items.json: item 1 has no asin"),
        ([raw(), 5], r"items.json: item 2 is no object"),
        ([raw(pricing="call us")], r"items.json: product B01 \(item 1\): its pricing 'call us' is no price"),
        ([raw(pricing="$")], r"product B01 \(item 1\): its pricing '\$' is no price"),
        ([raw(pricing="$1.2.3")], r"product B01 .* is no price"),
        ([raw(pricing=[5])], r"product B01 .* is no price"),
        ([{**raw(), "name": None}], r"product B01 \(item 1\): its Title has to be a string, not null"),
        ([{k: v for k, v in raw().items() if k != "images"}], r"product B01 \(item 1\) has no 'images'"),
        ([raw(images=[])], r"product B01 \(item 1\): list index"),
        ([raw(customization_options={"size": [{"image": ""}]})], r"product B01 \(item 1\) has no 'value'"),
        ([raw("nan")], r"items.json: it has no product"),
        ({"B01": raw()}, r"items.json: no valid JSON at character 0 \(line 1\): a list has to come there"),
        ("[\n{}", r"items.json: item 1 has no asin"),
        (json.dumps([raw()])[:-1], r"items.json: no valid JSON at character \d+ \(line 1\): a comma or the end"),
        ("", r"no valid JSON at character 0 \(line 1\): a list has to come there, not 'the end'"),
    ],
)
def test_malformed_products_are_named(items: Any, message: str, read: Reader):
    with pytest.raises(ValueError, match=message):
        read(items)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"B01": []}, "entries.json: the value of 'B01' has to be an object"),
        ({"B01": {"attributes": "soft"}}, "entries.json: 'attributes' of 'B01' has to be a list"),
        ('{"B01": {}\n "B02": {}}', r"entries.json: no valid JSON at character 12 \(line 2\): a comma"),
        ("{1: {}}", r"entries.json: no valid JSON at character 2 \(line 1\): a key has to be a string"),
    ],
)
def test_malformed_entries_are_named(entries: Any, message: str, read: Reader):
    with pytest.raises(ValueError, match=message):
        read([raw()], entries)


def test_malformed_human_instructions_are_named(read: Reader):
    with pytest.raises(ValueError, match=r"human.json: the value of 'B01' has to be a list of objects"):
        dict(read([raw()], human={"B01": {"instruction": ""}}).human)


def test_a_store_is_kept_until_a_file_changes(read: Reader, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = read([raw()])
    sources = Sources(tmp_path / "items.json", tmp_path / "entries.json")
    (tmp_path / "store" / "mark").touch()
    with caplog.at_level(logging.WARNING):
        assert open_catalogue(sources, tmp_path / "store").digest == first.digest
    assert (tmp_path / "store" / "mark").exists()
    assert not caplog.records
    assert read([raw("B02")]).asins == ["B02"]
    assert "made again: it was made with another items" in caplog.text
    assert first["B01"]["asin"] == "B01"  # whoever has the old one open keeps it
    first.close()
    first.close()


def test_files_are_found_in_a_folder(tmp_path: Path):
    for name in ("items_shuffle.json", "items_shuffle_1000.json", "items_ins_v2_1000.json"):
        (tmp_path / name).touch()
    sources = Sources.in_folder(tmp_path)
    assert (sources.items.name, sources.attributes.name, sources.human) == (
        "items_shuffle.json",
        "items_ins_v2_1000.json",
        None,
    )
    (tmp_path / "items_ins_v2_1000.json").unlink()
    with pytest.raises(ValueError, match=r"0 files items_ins_v2\*\.json"):
        Sources.in_folder(tmp_path)
    with pytest.raises(ValueError, match=r"items_shuffle.json: cannot be read"):
        open_catalogue(Sources(tmp_path / "none" / "items_shuffle.json", sources.attributes), tmp_path / "store")


VALUES = [{"a": 'é\\"]}', "b": [1, {"c": None}]}, "x" * 20, 12345, -1.5e3, [], {}, "\U0001f600", True, 67]


@pytest.mark.parametrize("chunk", range(1, 40))
def test_streams_do_not_depend_on_where_chunks_end(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "file.json"
    for indent in (None, 1):
        path.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=bool(chunk % 2)), "utf-8")
        assert list(json_stream.items(path)) == VALUES
        named = {f"k{number}": value for number, value in enumerate(VALUES)}
        path.write_text(json.dumps(named, indent=indent), "utf-8")
        assert dict(json_stream.entries(path)) == named
    for text in ("[]", " [ ] \n"):
        path.write_text(text)
        assert list(json_stream.items(path)) == []


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "character", "line"),
    [
        ("[1, 2,\n {'a': 1}]", 9, 2),
        ('[1, {"a": 1,\n "b" 2}]', 18, 2),
        ("[1, 2] 3", 7, 1),
        ("[1 2]", 3, 1),
        ('[{"a": "b', 7, 1),
        ("[1,", 3, 1),
        ('\n\n["a\nb"]', 5, 3),
    ],
)
def test_where_json_is_broken(
    text: str, character: int, line: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "file.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=rf"file.json: no valid JSON at character {character} \(line {line}\): "):
        list(json_stream.items(path))


def test_what_never_ends_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "LONGEST", 100)
    path = tmp_path / "file.json"
    path.write_text('[1, "' + "x" * 100_000, "utf-8")
    with path.open(encoding="utf-8") as file:
        reader = json_stream._Reader(path, file)
        reader.expect("[", "")
        reader.value()
        reader.expect(",", "")
        with pytest.raises(ValueError, match=r"character 4 .*Unterminated string"):
            reader.value()
        assert len(reader.text) < 1000


def test_a_file_that_is_no_text(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_bytes(b'["\xff\xfe"]')
    with pytest.raises(ValueError, match=r"file.json: no valid JSON at character 0 .*no UTF-8"):
        list(json_stream.items(path))
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        list(json_stream.items(path))
