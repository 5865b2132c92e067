"""The page of a run as a reader sees it, in headless Chromium."""

import base64
import re
import shutil
import time

import numpy as np
import pytest
from browser import chromium
from reports import unpack
from toyworld import TOY

from atod_algos.report.command import report
from atod_algos.report.data import read_run
from atod_envs.trajectory import StopReason, Trajectory, Turn, write_jsonl

pytestmark = pytest.mark.slow

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">&amp;'


@pytest.fixture(scope="module")
def chrome():
    with chromium(1400, 900) as found:
        yield found


class Viewer:
    """The page, driven as a reader would."""

    def __init__(self, chrome, path):
        self.chrome = chrome
        chrome.get(path.as_uri())
        deadline = time.monotonic() + 60
        while self.js("return document.body.dataset.ready") != "1":
            assert time.monotonic() < deadline, chrome.get_log("browser")
            time.sleep(0.05)

    def js(self, code, *values):
        return self.chrome.execute_script(code, *values)

    def open(self):
        self.chrome.find_element("id", "tab-episodes").click()

    def click(self, selector):
        # In one go as well: an element that was found may have been replaced before it is clicked.
        self.js("document.querySelector(arguments[0]).click()", selector)

    def choose(self, name, value):
        self.js(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
            name,
            value,
        )

    def text(self, selector):
        # In one go: the list is drawn anew at every scroll, and its old rows are gone.
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText ?? e.textContent)", selector
        )

    def count(self):
        return int(self.text("#count")[0].split()[0].replace(",", ""))


def test_the_page_in_headless_chromium(folders, tmp_path, chrome):
    page = report([folders / "atod", folders / "grpo"], out=tmp_path, figures=False)
    data = unpack(page)
    view = Viewer(chrome, page)
    assert view.text("h1") == [f"ATOD, seed 0 and GRPO, seed 0 on {TOY}"]
    assert "success" in view.text("table")[0] and len(view.text(".curve svg")) >= 8
    view.open()
    assert view.count() == len(data["episodes"])

    solved = sum(e["ok"] for e in data["episodes"])
    view.choose("f-outcome", "1")
    assert view.count() == solved
    view.choose("f-step", "traintraining step 3")
    assert view.count() == sum(e["ok"] and e["k"] == "train" and e["s"] == 3 for e in data["episodes"])
    view.choose("f-outcome", "")
    view.choose("f-run", "0")
    assert view.count() == 16
    view.choose("f-step", "")
    view.choose("f-run", "")
    chrome.find_element("id", "f-task").send_keys("plum")
    deadline = time.monotonic() + 60
    wanted = sum(
        "plum" in e["i"] or "plum" in e["t"] or any("plum" in t["c"] for t in e["turns"]) for e in data["episodes"]
    )
    while view.count() != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert view.count() == wanted
    view.js("document.getElementById('f-task').value = ''")

    view.choose("f-step", "traintraining step 1")
    view.choose("f-run", "0")
    view.click(".row")
    episode = next(e for e in data["episodes"] if e["r"] == 0 and e["k"] == "train" and e["s"] == 1)
    first = episode["turns"][0]
    shown = view.text(".turn")
    assert len(shown) == len(episode["turns"])
    assert f"d {first['d']:.3f}" in shown[0] and f"h {first['h']:.3f}" in shown[0] and f"w {first['w']:.2f}" in shown[0]
    assert first["o"] in shown[0] and f"action: {first['c']}" in shown[0] and ("valid" in shown[0]) == bool(first["v"])
    assert "w = 1 − (1 − " in shown[0]
    spans = chrome.find_element("css selector", ".turn").find_elements("css selector", ".response span")
    assert len(spans) == len(first["x"])
    # The darkest token is the one with the largest gap, and its tip says the numbers.
    gaps = [abs(t - s) for _, s, t in first["x"]]
    darkest = spans[int(np.argmax(gaps))]
    assert "rgba" in darkest.get_attribute("style") and "gap" in darkest.get_attribute("title")

    # The same task before and after, side by side; the address brings it back.
    view.choose("f-step", "validvalidation after step 0")
    view.click(".row")
    view.choose("f-compare", "0")
    assert len(chrome.find_elements("css selector", ".episode")) == 2
    heads = view.text(".episode .head b")
    assert heads[0] == heads[1]
    address = chrome.current_url
    chrome.get("about:blank")
    chrome.get(address)
    deadline = time.monotonic() + 60
    while len(chrome.find_elements("css selector", ".episode")) != 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert view.text(".episode .head b") == heads

    view.choose("f-mode", "t")
    view.choose("f-sort", "w")
    weights = [float(re.search(r"w ([\d.]+)", text)[1]) for text in view.text(".row .mono")]
    assert weights == sorted(weights, reverse=True) and weights[0] == 1.0
    assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_curves_have_units_are_smoothed_and_lead_to_episodes(folders, tmp_path, chrome):
    page = report([folders / "atod", folders / "grpo"], out=tmp_path, figures=False)
    data = unpack(page)
    view = Viewer(chrome, page)
    titles = view.text("#curves .curve h3")
    units = dict(zip(titles, view.text("#curves .axis.y"), strict=True))
    assert units["validation success"] == "success, %" and units["entropy"] == "nats a token"
    assert set(view.text("#curves .axis.x")) == {"training step"} and "" not in units.values()

    def line(title, kind="line"):
        code = "return [...document.querySelectorAll('#curves .curve')][arguments[0]].querySelector('path.' + arguments[1])?.getAttribute('d')"
        return view.js(code, titles.index(title), kind)

    def smooth(place):
        code = "const s = document.getElementById('smoothing'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
        view.js(code, place)

    smooth(0)
    assert view.text("output") == ["off"]
    measured, validated = line("entropy"), line("validation success")
    smooth(1)
    assert view.text("output") == ["mean of 3 steps"]
    assert (
        line("entropy") != measured and line("entropy", "raw") == measured and line("validation success") == validated
    )

    # A run of the legend is hidden by a click, and shown again by another.
    lines = "return document.querySelectorAll('#curves path.line').length"
    every = view.js(lines)
    view.click(".legend button")
    assert 0 < view.js(lines) < every
    view.click(".legend button")
    assert view.js(lines) == every

    # The pointer says the values; a point is a link to the episodes of its step.
    moved = "const s = document.querySelector('.curve svg'), p = s.getBoundingClientRect();"
    moved += "s.dispatchEvent(new PointerEvent('pointermove', {clientX: p.right - 5, clientY: p.top + 50}))"
    view.js(moved)
    last = data["runs"][1]["series"]["val"][1][-1]
    assert "step 4" in view.text(".tip")[0] and f"{100 * last:.4g}" in view.text(".tip")[0]
    point = chrome.find_element("css selector", "a[href='#step/1/train/3']")
    view.js("arguments[0].scrollIntoView({block: 'center'})", point)
    point.click()
    deadline = time.monotonic() + 60
    while view.js("return document.getElementById('episodes').hidden") and time.monotonic() < deadline:
        time.sleep(0.05)
    wanted = [e for e in data["episodes"] if (e["r"], e["k"], e["s"]) == (1, "train", 3)]
    assert view.count() == len(wanted) == 16
    assert wanted[0]["i"] == view.text(".episode .head b")[0] and "#episodes/" in chrome.current_url
    chrome.back()
    while view.js("return document.getElementById('overview').hidden") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not view.js("return document.getElementById('overview').hidden")


def test_turn_weights_are_drawn_by_step_and_by_turn(folders, tmp_path, chrome):
    page = report([folders / "atod"], out=tmp_path, figures=False)
    view = Viewer(chrome, page)
    assert view.text("#weights h3")[1:] == [
        "share of turns by weight", "disagreement by turn", "uncertainty by turn", "weight by turn"
    ]  # fmt: skip
    shares = [float(re.search(r": ([\d.]+) %", text)[1]) for text in view.text("#weights .cell title")]
    assert len(shares) == 4 * 10 and sum(shares) == pytest.approx(400, abs=2)  # four steps, ten classes of weight
    assert view.text("#weights .axis.y")[1:3] == ["d_k, nats a token", "episodes (dashed)"]


def test_dark_mode_follows_the_system_until_it_is_chosen(folders, tmp_path, chrome):
    page = report([folders / "grpo"], out=tmp_path, figures=False, compute=False)
    ground = "return getComputedStyle(document.body).backgroundColor"
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    view = Viewer(chrome, page)
    light = view.js(ground)
    try:
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        view = Viewer(chrome, page)
        night = view.js(ground)
        assert night != light and view.text("#theme") == ["Light"]
        view.click("#theme")
        assert view.js(ground) == light and view.text("#theme") == ["Dark"]
        view = Viewer(chrome, page)
        assert view.js(ground) == light  # the choice is kept
        view.click("#theme")
        assert view.js(ground) == night
    finally:
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        view.js("localStorage.clear()")


def test_an_overview_prints_on_one_page(folders, tmp_path, chrome):
    from selenium.webdriver.common.print_page_options import PrintOptions

    page = report([folders / "atod"], out=tmp_path, figures=False)
    view = Viewer(chrome, page)
    view.js("document.documentElement.dataset.theme = 'dark'")
    paper = PrintOptions()
    paper.page_width, paper.page_height = 21.0, 29.7  # cm
    printed = base64.b64decode(chrome.print_page(paper))
    assert len(re.findall(rb"/Type /Page\b", printed)) == 1
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert view.js("return getComputedStyle(document.querySelector('nav')).display") == "none"
        assert view.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def big_run(folder, source, episodes, hostile=""):
    """A copy of a run whose one stored step holds many made-up episodes."""
    shutil.copytree(source, folder)
    for name in ("trajectories", "validation", "turns", "scores"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "trajectories").mkdir()
    made = []
    for n in range(episodes):
        said = f"go to shelf {{}} {hostile}"
        turns = tuple(
            Turn(
                k, f"You see {hostile or 'a shelf'} {n}.{k}", ("look", hostile or "go"), (), (), (), said.format(k), said.format(k),
                True, k % 3 > 0, 0.0,
            )
            for k in range(10)
        )  # fmt: skip
        made.append(
            Trajectory(
                "e", f"t{n}{hostile}", "s", f"find {hostile or 'it'} {n}", str(n // 8), 0, turns, hostile, n % 2 == 0, 0.5,
                StopReason.TURN_LIMIT, labels={"k": hostile or "x"},
            )
        )  # fmt: skip
    write_jsonl(folder / "trajectories" / "step_000001.jsonl.gz", made)
    return read_run(folder)


def test_text_of_a_run_is_never_markup(folders, tmp_path, chrome):
    run = big_run(tmp_path / f"r{'<b>'}", folders / "grpo", 8, HOSTILE)
    page = report([run.path], figures=False, compute=False)
    view = Viewer(chrome, page)
    view.open()
    assert HOSTILE in view.text(".turn .obs")[0] and chrome.title != "owned"
    for mode in ("t", "e"):
        view.choose("f-mode", mode)
    assert chrome.find_elements("css selector", "img") == [] and view.text("#subtitle") == ["r<b>"]
    assert chrome.title == f"GRPO, seed 0 on {TOY}"


def test_ten_thousand_turns_stay_quick(folders, tmp_path, chrome):
    run = big_run(tmp_path / "r", folders / "grpo", 1000)
    page = report([run.path], figures=False, compute=False)
    view = Viewer(chrome, page)
    view.open()
    view.choose("f-mode", "t")
    assert view.count() == 10_000
    assert len(chrome.find_elements("css selector", ".row")) < 60  # a virtual list
    timed = """
        const done = arguments[arguments.length - 1], list = document.getElementById("list"), from = performance.now();
        let n = 0, most = 0;
        (function next() {
            most = Math.max(most, document.querySelectorAll(".row").length);
            list.scrollTop = list.scrollHeight * n / 20;
            if (++n > 20) done([most, performance.now() - from]); else requestAnimationFrame(next);
        })();
    """
    chrome.set_script_timeout(120)
    most, milliseconds = chrome.execute_async_script(timed)  # 21 jumps through all of it
    assert most < 60 and milliseconds < 30_000
    sort = """
        const from = performance.now(), select = document.getElementById("f-sort");
        select.value = "h"; select.dispatchEvent(new Event("change")); return performance.now() - from;
    """
    started = view.js(sort)
    assert started < 20_000
    view.js("document.getElementById('list').scrollTop = 1e9")
    deadline = time.monotonic() + 60
    while "turn 10 of 10" not in " ".join(view.text(".row")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "turn 10 of 10" in " ".join(view.text(".row"))
