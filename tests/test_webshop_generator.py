import itertools
import math
from collections import Counter

import pytest

from envs.webshop import generator
from envs.webshop.catalogue import Sources, open_catalogue
from envs.webshop.goals import draw


def written(folder, products=300, seed=0):
    folder.mkdir()
    generator.write(folder, products, seed)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, again, other = (written(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first.keys() == {"items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"}
    assert first["items_shuffle.json"] != other["items_shuffle.json"]


def test_it_is_read_as_the_official_files_are(tmp_path):
    written(tmp_path / "files")
    catalogue = open_catalogue(Sources.in_folder(tmp_path / "files"), tmp_path / "store")
    assert len(catalogue) == 300
    assert catalogue.skipped == {}
    drawn = draw(catalogue, 0, pricings=catalogue.pricings(), instructions=catalogue.human)
    assert len(drawn.goals) == 300
    for goal in drawn.goals:
        product = catalogue[goal["asin"]]
        assert set(goal["attributes"]) <= set(product["Attributes"])
        values = {value for values in product["options"].values() for value in values}
        assert set(goal["goal_options"]) <= values
        assert all(value in goal["instruction_text"] for value in goal["goal_options"])
        assert all(attribute in goal["instruction_text"] for attribute in goal["attributes"])
        assert goal["price_upper"] > drawn.prices[goal["asin"]]
    assert len(draw(catalogue, 0, attributes=catalogue.entries).goals) > 1000


def test_every_kind_is_sold_as_often_as_any_other_and_can_be_told_from_it():
    kinds = generator.kinds()
    assert len(kinds) >= 50
    assert len({kind.query for kind in kinds}) == len({kind.path for kind in kinds}) == len(kinds)
    assert set(Counter(kind.category for kind in kinds)) == {"beauty", "electronics", "fashion", "garden", "grocery"}
    sold = Counter(product["query"] for product, _, _ in generator.generate(10 * len(kinds), 0))
    assert set(sold.values()) == {10}


def test_prices_vary_as_official_ones_do():
    tags = [product["pricing"] for product, _, _ in generator.generate(3000, 0)]
    assert 0.01 < sum(tag == "" for tag in tags) / len(tags) < 0.07
    assert 0.06 < sum(" - " in tag for tag in tags) / len(tags) < 0.14


def test_asins_never_repeat_and_look_like_asins():
    asins = [product["asin"] for product, _, _ in generator.generate(5000, 7)]
    assert len(set(asins)) == 5000
    assert all(len(asin) == 10 and asin.isalnum() and asin == asin.upper() for asin in asins)
    assert math.gcd(generator.STEP, len(generator.SYLLABLES) ** 4) == 1  # so that it meets each one once
    with pytest.raises(ValueError, match="at most 100000000 products"):
        next(generator.generate(10**9, 0))


def test_large_catalogues_have_as_many_instructions_as_the_official_one(monkeypatch):
    monkeypatch.setattr(generator, "INSTRUCTIONS", 50)
    told = [place for place, (_, _, told) in enumerate(generator.generate(1000, 0)) if told]
    assert len(told) == 50
    assert max(after - before for before, after in itertools.pairwise(told)) == 20


def test_instructions_read_like_peoples():
    texts = [told["instruction"] for _, _, told in generator.generate(2000, 0) if told]
    assert len(set(texts)) > 1900
    assert all(text == text.lower() for text in texts)
    assert not any(" a an " in text or " an a " in text or "  " in text for text in texts)
    assert {text.split()[0] for text in texts} >= {"i", "i'd", "find", "show", "please", "can", "looking", "buy"}
