"""The shop in a browser: a visit from start to purchase, by plain requests and in headless Chromium."""

import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from html import unescape

import pytest
from browser import chromium

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")

from atod_envs.trajectory import StopReason, read_jsonl
from atod_envs.webshop.browser import page_body
from atod_envs.webshop.expert import WebShopExpert
from atod_envs.webshop.pages import Role
from atod_envs.webshop.serve import LONGEST_REQUEST, ShopServer


@pytest.fixture
def server(tmp_path):
    server = ShopServer(("127.0.0.1", 0), {"split": "test", "goals": "synthetic"}, tmp_path / "kept" / "visits.jsonl")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def request(url, **form):
    body = urllib.parse.urlencode(form).encode() if form else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as answer:
            return answer.status, answer.url, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, url, error.read().decode()


def test_a_visit_is_played_and_recorded(server):
    status, url, page = request(server.url + "start", task=server.tasks[0])
    visit = server.visits[url.rsplit("/", 1)[1]]
    assert status == 200 and unescape(re.search(r"id='task'>(.*?)</b>", page)[1]) == visit.info["task"]
    expert = WebShopExpert()
    observation = visit.shop_env.session.observe("text")
    expert.reset(visit.info["task"], observation, visit.info["admissible"])
    while "id='reward'" not in page:
        action = expert.act(visit.shop_env.session.observe("text"), visit.info["admissible"]).action
        if action.startswith("search["):
            _, _, page = request(url, query=action[len("search[") : -1])
        else:
            # Every click stands on the page as a button.
            buttons = {unescape(value).lower(): unescape(value) for value in re.findall(r'value="(.*?)"', page)}
            _, _, page = request(url, action=buttons[action])
    (kept,) = read_jsonl(server.record)
    assert kept.success and kept.stop_reason is StopReason.SUCCESS and "1.000" in page
    assert kept.task_id == server.tasks[0] and kept.turns[-1].action.lower() == "click[buy now]"
    before = len(visit.env.trajectory.turns)
    request(url, action="click[back to search]")
    assert len(visit.env.trajectory.turns) == before  # the visit is over


def test_nonsense_is_answered(server):
    assert request(server.url + "visit/none")[0] == 404 and request(server.url + "x", a="b")[0] == 404
    status, _, page = request(server.url + "start", task="synthetic/x<script>")
    assert status == 400 and "<script>" not in page and "unknown task id" in page
    _, url, _ = request(server.url + "start", task="")
    assert "not understood" in request(url, action="click[<b>]")[2]
    assert "<b>x</b>" not in request(url, query="<b>x</b>")[2]
    assert request(url, query="x" * (LONGEST_REQUEST + 1))[0] == 413


def test_every_click_of_the_observation_is_a_button_of_the_page(server):
    rng = random.Random(3)
    pages = 0
    for task in server.tasks[:12]:
        _, url, page = request(server.url + "start", task=task)
        visit = server.visits[url.rsplit("/", 1)[1]]
        for _ in range(12):
            session = visit.shop_env.session
            buttons = [unescape(value) for value in re.findall(r'name="action" value="(.*?)"', page)]
            clicks = [name for name in session.clickables if name.strip() and name != "search"]
            assert sorted({button.lower() for button in buttons}) == sorted(f"click[{name}]" for name in clicks)
            assert page.count("id='task'") == 1 and "None" not in re.sub(r"<style>.*?</style>", "", page)
            pages += 1
            allowed = [button for button in buttons if button != "click[Buy Now]"]
            if allowed and rng.random() < 0.8:
                _, _, page = request(url, action=rng.choice(allowed))
            else:
                _, _, page = request(url, query=" ".join(visit.info["task"].split()[2:8]))
            assert "not understood" not in page
    assert pages == 144


def test_a_chosen_option_is_marked_under_its_own_name():
    nodes = [
        (Role.TEXT, "Size"), (Role.OPTION, "one"), (Role.OPTION, "two"), (Role.TEXT, "Fit <b>"), (Role.OPTION, "one"),
        (Role.TEXT, "A title"), (Role.TEXT, "Price: $3"), (Role.BUTTON, "Features"), (Role.BUTTON, "Buy Now"),
    ]  # fmt: skip
    page = page_body([(Role.BUTTON, "< Prev"), *nodes], {"size": "one"}, "click[one]")
    size, fit = re.findall(r"<fieldset>.*?</fieldset>", page)
    assert size.count("aria-pressed='true'") == 1 and "autofocus" in size
    assert "aria-pressed='true'" not in fit and "<legend>Fit &lt;b&gt;</legend>" in fit
    assert "<h1>A title</h1>" in page
    nameless = page_body(nodes[1:2] + nodes[5:], {"": "one"}, "")
    assert nameless.count("class='option chosen'") == 1 and "<legend>" not in nameless


@pytest.fixture(scope="module")
def chrome():
    with chromium(1000, 700) as found:
        found.implicitly_wait(20)
        yield found


def turned(chrome, act):
    """Do something that leads to another page, and wait for it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import staleness_of
    from selenium.webdriver.support.ui import WebDriverWait

    page = chrome.find_element(By.TAG_NAME, "html")
    act()
    WebDriverWait(chrome, 60).until(staleness_of(page))  # a click returns before the next page is there
    chrome.find_element(By.TAG_NAME, "main")


def wanted(task):
    """What to search for."""
    return re.match(r"Find me (.*?)(?: with \w[\w ]*: |, and price)", task)[1]


@pytest.mark.slow
def test_in_headless_chromium(server, chrome):
    from selenium.webdriver.common.by import By

    def find(selector):
        return chrome.find_element(By.CSS_SELECTOR, selector)

    def press(element):
        turned(chrome, element.click)

    def button(text):
        return chrome.find_element(By.XPATH, f"//button[text()='{text}']")

    chrome.get(server.url)
    find("#task").send_keys(server.tasks[1])
    press(find("#start"))
    words = wanted(find("header #task").text)
    find("#query").send_keys(words)
    press(find("#search"))
    # Each result is one card with a place for a picture, a title and a price, and one click; the ways through are
    # apart.
    assert chrome.find_element(By.XPATH, "//nav/p[text()='Page 1 (Total results: 50)']")
    cards = chrome.find_elements(By.CSS_SELECTOR, "ul.cards > li > button.product")
    assert len(cards) == 10 == len(chrome.find_elements(By.CSS_SELECTOR, "ul.cards button"))
    for card in cards:
        assert card.find_element(By.CSS_SELECTOR, ".image").size["height"] > 50
        assert (
            card.find_element(By.CSS_SELECTOR, ".title").text
            and "$" in card.find_element(By.CSS_SELECTOR, ".price").text
        )
    places = {(card.location["x"], card.location["y"]) for card in cards}
    assert len(places) == 10 and len({x for x, _ in places}) > 1  # side by side, not in one column
    following = chrome.find_elements(By.XPATH, "//button[text()='Next >']")
    ys = sorted(y for _, y in places)
    bottom = max(card.location["y"] + card.size["height"] for card in cards)
    assert len(following) == 2 and following[0].location["y"] < ys[0] and following[1].location["y"] >= bottom
    press(following[0])
    assert chrome.find_element(By.XPATH, "//nav/p[text()='Page 2 (Total results: 50)']")
    press(button("< Prev"))
    # The instruction is in sight at the end of the page, too.
    chrome.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    top = chrome.execute_script("return [window.scrollY, document.querySelector('#task').getBoundingClientRect().top]")
    assert top[0] > 100 and 0 <= top[1] < 100
    press(find("button.product"))
    choice = find("button.option")
    text = choice.text
    press(choice)
    chosen = find("button.chosen")
    assert chosen.text == text and chosen.get_attribute("aria-pressed") == "true"
    assert chrome.switch_to.active_element == chosen  # a keyboard user stays there
    press(button("Features"))
    press(button("< Prev"))
    press(find("button.buy"))
    reward = float(find("#reward").text)
    assert not chrome.get_log("browser")  # nothing that the pages' own policy forbids
    (kept,) = read_jsonl(server.record)
    assert kept.score == pytest.approx(reward, abs=5e-4) and kept.turns[0].action == f"search[{words}]"


@pytest.mark.slow
def test_a_visit_by_keyboard_alone(server, chrome):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def keys(*pressed):
        ActionChains(chrome).send_keys(*pressed).perform()

    def focused():
        return chrome.switch_to.active_element

    chrome.get(server.url)
    assert focused().get_attribute("id") == "task"
    turned(chrome, lambda: keys(server.tasks[2], Keys.ENTER))
    assert focused().get_attribute("id") == "query"
    words = wanted(chrome.find_element(By.CSS_SELECTOR, "header #task").text)
    turned(chrome, lambda: keys(words, Keys.ENTER))
    assert focused().get_attribute("class") == "product" and focused().get_attribute("accesskey") == "1"
    turned(chrome, lambda: keys(Keys.ENTER))
    for _ in range(60):
        if focused().get_attribute("class") == "buy":
            break
        keys(Keys.TAB)
        outline = focused().value_of_css_property("outline-style")
        assert focused().tag_name == "button" and outline == "solid"  # where one is can be seen
    turned(chrome, lambda: keys(Keys.ENTER))
    assert chrome.find_element(By.ID, "reward").text and focused().text == "Another one"
