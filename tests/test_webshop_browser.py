import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from envs.webshop.server import serving
from envs.webshop.text import Shop, WebShopText
from tests.official_webshop import LAMP, TWO, product
from tests.test_report import ARGUMENTS, CONTRAST
from tests.webshop_site import goal_of, small_shop

pytestmark = pytest.mark.browser

TITLE = """Lamp <script>window.injected = true</script> "quoted" & 'more' <b>bold</b>"""
ODD = product("B0ODD", TITLE, options={'<i>"name"</i>': ["""<img src=x onerror="window.injected = true"> 'a' """]})
PICTURED = {**LAMP, "MainImage": "https://pictures.example/lamp.jpg"}
MANY = {f"B{number}": product(f"B{number}", f"Lamp number {number}") for number in range(30)}


@pytest.fixture(scope="module")
def shop() -> Shop:
    everything = {"B0LAMP": PICTURED, "b0mug": TWO["b0mug"], "B0ODD": ODD, **MANY}
    return small_shop(everything, search=lambda query, k: ["B0LAMP", "B0ODD", *MANY] if "lamp" in query else [])


@pytest.fixture(scope="module")
def site(shop: Shop) -> Iterator[str]:
    with serving(shop) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.fail("These tests drive a real Chromium and find none: apt-get install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, site: str, shop: Shop) -> Iterator[Any]:
    """The search page of a customer who wants a lamp; whatever goes wrong fails the test at its end."""
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(site) else wrong.append(request.url))
    page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{site}/fixed_{goal_of(shop, 'B0LAMP')}")
    yield page
    assert wrong == []
    assert page.evaluate("window.injected") is None
    page.close()


def test_a_person_shops(page: Any, shop: Shop):
    env = WebShopText(shop)
    env.reset(goal_of(shop, "B0LAMP"))
    assert page.text_content("#instruction-text p") == env.goal["instruction_text"]
    assert page.evaluate("document.activeElement.id") == "search_input"
    page.keyboard.type("Floor Lamp")
    page.keyboard.press("Enter")
    page.wait_for_selector(".product")
    assert page.text_content("h1") == "Page 1 (Total results: 32)"
    page.get_by_role("link", name="Floor Lamp B0LAMP").click()
    page.wait_for_selector(".item")
    assert page.locator("input:checked").count() == 0
    page.click("label:has-text('black')")
    page.wait_for_url("**black**")
    assert page.input_value("input:checked") == "black"
    page.click("button:has-text('Description')")
    page.wait_for_selector(".reading")
    assert page.text_content(".product-info") == LAMP["Description"]
    page.click("button:has-text('< Prev')")
    page.wait_for_selector(".item")
    assert page.input_value("input:checked") == "black"
    page.click("button:has-text('Buy Now')")
    page.wait_for_selector("#reward")
    for action in ("search[floor lamp]", "click[b0lamp]", "click[black]"):
        env.step(action)
    assert float(page.text_content("#reward pre")) == env.step("click[buy now]").reward == 0.75
    assert page.locator("meter").get_attribute("value") == "0.75"


def test_markup_in_titles_and_options_is_shown_as_text(page: Any):
    page.fill("#search_input", f"lamp {TITLE.replace('/', '')}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".product")
    assert page.locator(".product-title").nth(1).text_content() == TITLE
    page.locator(".product-link").nth(1).click()
    page.wait_for_selector(".item")
    assert page.text_content(".about h1") == TITLE
    assert page.title() == f"{TITLE} - WebShop"
    name, values = next(iter(ODD["options"].items()))
    assert page.text_content("legend") == name
    assert page.text_content("label") == values[0]
    assert page.locator("i, img, main b").count() == 0


def test_the_keyboard_chooses_among_options(page: Any, site: str):
    page.goto(f"{site}/item_page/fixed_0/B0LAMP/lamp/1/{{}}")
    page.locator("input[value=black]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**dark%20red**")
    page.wait_for_load_state()
    assert page.evaluate("document.activeElement.value") == "dark red"
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**black**")
    page.wait_for_load_state()
    assert page.input_value("input:checked") == "black"


def test_going_back_in_the_browser_shows_what_was_chosen_there(page: Any, site: str):
    page.goto(f"{site}/item_page/fixed_0/B0LAMP/lamp/1/{{}}")
    page.check("input[value=black]")
    page.wait_for_url("**black**")
    page.go_back()
    page.wait_for_url("**%7B%7D")
    page.wait_for_load_state()
    assert page.locator("input:checked").count() == 0


def test_pages_of_results_are_turned(page: Any):
    page.fill("#search_input", "lamp")
    page.click("button:has-text('Search')")
    page.wait_for_selector(".product")
    assert page.locator(".product").count() == 10
    page.click("button:has-text('Next >')")
    page.wait_for_selector("text=Page 2 (Total results: 32)")
    page.click("button:has-text('< Prev')")
    page.wait_for_selector("text=Page 1 (Total results: 32)")
    page.mouse.wheel(0, 2000)
    assert page.locator("button:has-text('Next >')").is_visible()
    page.click("button:has-text('Back to Search')")
    page.wait_for_selector("#search_input")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_pages_fit_and_can_be_read(page: Any, site: str, scheme: str, width: int):
    """No sideways scrolling, a name for each control, and a contrast of at least 4.5 (WCAG 2.1 AA)."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for path in (
        "fixed_0",
        "search_results/fixed_0/lamp/1",
        "search_results/fixed_0/nothing/1",
        "item_page/fixed_0/B0LAMP/lamp/1/{'color': 'black'}",
        "item_page/fixed_0/B0ODD/lamp/1/{}",
        "item_sub_page/fixed_0/B0LAMP/lamp/1/Features/{}",
        "item_sub_page/fixed_0/B0LAMP/lamp/1/Reviews/{}",
        "done/fixed_0/B0LAMP/{}",
    ):
        page.goto(f"{site}/{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        worst = page.evaluate(CONTRAST)
        assert worst["ratio"] >= 4.5, (path, worst)
        for control in page.get_by_role("button").all() + page.get_by_role("link").all():
            assert control.text_content().strip()
        unnamed = "[...document.querySelectorAll('input')].filter(one => !one.labels.length && !one.ariaLabel).length"
        assert page.evaluate(unnamed) == 0
