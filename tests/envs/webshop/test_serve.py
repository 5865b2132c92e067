"""The shop in a browser: a visit from start to purchase, by plain requests and in headless Chromium."""

import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from html import unescape

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")

from atod_envs.trajectory import StopReason, read_jsonl
from atod_envs.webshop.expert import WebShopExpert
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


def test_in_headless_chromium(server):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver on this machine")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import staleness_of
    from selenium.webdriver.support.ui import WebDriverWait

    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    chrome.implicitly_wait(20)

    def press(element):
        page = chrome.find_element(By.TAG_NAME, "html")
        element.click()
        WebDriverWait(chrome, 20).until(staleness_of(page))  # a click returns before the next page is there

    try:
        chrome.get(server.url)
        chrome.find_element(By.ID, "task").send_keys(server.tasks[1])
        press(chrome.find_element(By.ID, "start"))
        task = chrome.find_element(By.CSS_SELECTOR, "header #task").text
        words = re.match(r"Find me (.*?)(?: with \w[\w ]*: |, and price)", task)[1]
        chrome.find_element(By.ID, "query").send_keys(words)
        press(chrome.find_element(By.ID, "search"))
        assert chrome.find_element(By.XPATH, "//p[text()='Page 1 (Total results: 50)']")
        results = chrome.find_elements(By.CSS_SELECTOR, "button.product")
        assert len(results) == 10
        press(results[0])
        choice = chrome.find_element(By.CSS_SELECTOR, "button.option")
        text = choice.text
        press(choice)
        assert chrome.find_element(By.CSS_SELECTOR, "button.chosen").text == text
        press(chrome.find_element(By.XPATH, "//button[text()='Features']"))
        press(chrome.find_element(By.XPATH, "//button[text()='< Prev']"))
        press(chrome.find_element(By.CSS_SELECTOR, "button.buy"))
        reward = float(chrome.find_element(By.ID, "reward").text)
    finally:
        chrome.quit()
    (kept,) = read_jsonl(server.record)
    assert kept.score == pytest.approx(reward, abs=5e-4) and kept.turns[0].action == f"search[{words}]"
