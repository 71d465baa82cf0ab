"""The page in headless Chromium, at 10,000 rollouts of hostile text: it opens, filters, and nothing runs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.inspect.report.runs import make_run, row
from tests.inspect.report.test_report import HOSTILE

from grpo.artifacts import ActiveRun
from grpo.inspect import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("chromium"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1440,1000"
)
ITERATIONS, GROUPS, SAMPLES = 5, 250, 8


def _rows() -> Iterator[dict[str, Any]]:
    """Every group has right and wrong answers but group 7, all right; sample 7 of group 3 is hostile."""
    for iteration in range(ITERATIONS):
        for group in range(GROUPS):
            for sample in range(SAMPLES):
                right = float(sample < 4 or group == 7)
                response = HOSTILE if (group, sample) == (3, 7) else f"é{group % 10}"
                yield row(
                    iteration, group, sample, response, rewards={"right": right}, reward=right,
                    prompt=f"{group}<b>?</b>", finish_reason="length" if sample == 5 else "stop",
                    keep=group != 7, reason="zero_variance" if group == 7 else None,
                    advantage=None if group == 7 else right - 0.5,
                )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    updates = [{"iteration": n, "kl": 0.1, "entropy": 1.0, "mismatch_mean": 1e-6} for n in range(ITERATIONS)]
    content, left_out = report.build([make_run(folder, _rows(), updates)], None)
    assert left_out == []
    (folder / "hand.html").write_bytes(content)
    return folder / "hand.html"


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, opened and drawn."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for option in OPTIONS.split():
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        driver.get(page.as_uri())
        WebDriverWait(driver, 120).until(
            lambda _: driver.execute_script("return document.body.dataset.ready")
        )
        yield driver
    finally:
        driver.quit()


@pytest.fixture(autouse=True)
def afresh(browser: Any) -> Iterator[None]:
    """Each test begins with everything shown, and ends without a word in the console."""
    click(browser, "f-reset")
    yield
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None


def click(browser: Any, name: str) -> None:
    """Click a button wherever it is, also below the bar or while the page is scrolling."""
    browser.execute_script("document.getElementById(arguments[0]).click()", name)


def choose(browser: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_value(value)


def found(browser: Any) -> str:
    text: str = browser.find_element("id", "found").text
    return text


def test_every_chart_is_drawn(browser: Any) -> None:
    titles = [element.text for element in browser.find_elements("css selector", "#charts-training h3")]
    assert titles[:3] == ["Reward", "Pass rate: right", "KL to the reference nats"]
    plots = browser.execute_script(
        "return [...document.querySelectorAll('#charts-training .plot')].map(p => [...p.data[0].y])"
    )
    assert (
        len(plots) == len(titles) == 8
    )  # all but clip fractions, gradient norm and seconds, which are not there
    assert (
        plots[0] == [pytest.approx((249 * 4 + 8) / 2000)] * ITERATIONS
    )  # half of each group, all of group 7
    assert browser.find_element("id", "absent-training").text.startswith(
        "Not in this run: Clipped (no update yet"
    )
    assert browser.find_element("id", "absent-evaluation").text == "No evaluation in this run."


def test_the_map_joins_neighbours_and_says_so(browser: Any) -> None:
    caption = browser.find_element("id", "heat-caption").text
    # 250 prompts at 3 pixels in 480: two a row
    assert "250 prompts from hardest to easiest, against the mean" in caption
    assert "a row is the mean over 2 prompts next to each other" in caption
    z = browser.execute_script("return document.getElementById('heat').data[0].z")
    assert len(z) == 125
    assert z[0] == [0.5] * ITERATIONS
    assert z[-1] == [0.75] * ITERATIONS  # group 7, all right, and a neighbour


def test_the_map_names_whole_iterations_in_the_middle_of_their_cells(browser: Any) -> None:
    ticks = "const {xaxis} = document.getElementById('heat').layout; return [xaxis.tickvals, xaxis.ticktext]"
    assert browser.execute_script(ticks) == [[0, 1, 2, 3, 4], ["0", "1", "2", "3", "4"]]
    choose(browser, "heat-column", "5")
    assert browser.execute_script(ticks) == [[2], ["0\u20134"]]
    choose(browser, "heat-column", "10")  # of which there are five; its middle is that of ten
    assert browser.execute_script(ticks) == [[4.5], ["0\u20134"]]
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    choose(browser, "heat-column", "1")  # five labels of 80 pixels do not fit
    assert browser.execute_script(ticks) == [[0, 2, 4], ["0", "2", "4"]]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    choose(browser, "heat-column", "auto")


def test_the_head_names_the_reward_of_the_pass_rate(browser: Any) -> None:
    first = browser.find_element("css selector", ".tile").text
    assert first == "50.2 %\npass rate of right, from 50.2 %"  # (249 * 4 + 8) / 2000


def test_a_cell_of_the_map_leads_to_its_rollouts(browser: Any) -> None:
    browser.execute_script(
        "document.getElementById('heat').emit('plotly_hover', {points: [{pointIndex: [124, 2]}]})"
    )
    assert browser.find_element("id", "heat-pointed").text.startswith(
        "75.0 % of 16 rollouts · iteration 2 · 2 prompts"
    )
    browser.execute_script(
        "document.getElementById('heat').emit('plotly_click', {points: [{pointIndex: [124, 2]}]})"
    )
    assert found(browser) == "16 of 10,000 rollouts in 2 groups"
    assert browser.find_element("id", "only-prompt").text.startswith("2 prompts, iteration 2")


def test_the_mouse_zooms_all_charts_and_points_at_the_map(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def ranges() -> set[str]:
        plots = "[...document.querySelectorAll('#charts-training .plot')]"
        return set(browser.execute_script(f"return {plots}.map(p => String(p.layout.xaxis.range))"))

    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 0)")
    area = browser.find_element("css selector", ".plot .nsewdrag")
    drag = ActionChains(browser).move_to_element_with_offset(area, -40, 0).click_and_hold()
    drag.move_by_offset(60, 0).release().perform()
    WebDriverWait(browser, 20).until(lambda _: len(ranges()) == 1 and ranges() != {"0,4"})
    # What a double click does, which a busy machine takes for two: one chart goes back to all iterations.
    browser.execute_script("Plotly.relayout(document.querySelector('.plot'), {'xaxis.autorange': true})")
    WebDriverWait(browser, 20).until(lambda _: ranges() == {"0,4"})
    browser.execute_script("document.getElementById('prompts').scrollIntoView()")
    area = browser.find_element("css selector", "#heat .nsewdrag")
    ActionChains(browser).move_to_element(area).perform()
    pointed = browser.find_element("id", "heat-pointed")
    WebDriverWait(browser, 20).until(lambda _: pointed.text.startswith("50.0 % of 16 rollouts"))


def test_each_filter_finds_what_it_should(browser: Any) -> None:
    assert found(browser) == "10,000 of 10,000 rollouts in 1,250 groups"
    choose(browser, "f-iteration", "3")
    assert found(browser) == "2,000 of 10,000 rollouts in 250 groups"
    choose(browser, "f-finish", "length")
    assert found(browser) == "250 of 10,000 rollouts in 250 groups"
    browser.find_element("id", "f-min").send_keys("0.5")
    assert found(browser) == "1 of 10,000 rollouts in 1 group"  # sample 5 is right in group 7 alone
    choose(browser, "f-keep", "yes")
    assert found(browser) == "0 of 10,000 rollouts in 0 groups"
    assert "No rollout matches." in browser.find_element("id", "groups").text
    choose(browser, "f-keep", "zero_variance")
    assert found(browser) == "1 of 10,000 rollouts in 1 group"
    click(browser, "f-reset")
    browser.find_element("id", "f-text").send_keys("249<B>")
    assert found(browser) == "40 of 10,000 rollouts in 5 groups"  # in the prompt, whatever the case
    assert browser.find_element("css selector", ".prompt").text == "249<b>?</b>"


def test_groups_come_in_the_order_that_was_chosen(browser: Any) -> None:
    def first() -> str:
        text: str = browser.find_element("css selector", ".group .line").text
        return text

    assert first().startswith("Iteration 4\ngroup 0\n")
    choose(browser, "f-order", "best")
    assert first() == "Iteration 0\ngroup 7\nprompt 7\nmean reward 1\nall 8 equal: no signal"
    choose(browser, "f-order", "longest")
    assert first().startswith("Iteration 0\ngroup 3\n")
    click(browser, "page-next")
    assert browser.find_element("id", "page-place").text == "groups 6\u201310 of 1,250"


def test_hostile_text_is_text(browser: Any) -> None:
    browser.find_element("id", "f-text").send_keys("window.hacked")
    assert found(browser) == "5 of 10,000 rollouts in 5 groups"
    card = browser.find_elements("css selector", ".sample")[7]
    shown = card.find_element("css selector", ".tokens").text
    assert shown == HOSTILE.replace("\x1b", "␛").replace("\u202e", "U+202E") + "<|endoftext|>"
    assert browser.find_elements("css selector", "#groups script, #groups img") == []


def test_the_bytes_of_a_character_are_one_token_to_point_at(browser: Any) -> None:
    token = browser.find_element("css selector", ".tokens span")
    assert token.text == "é"
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", token)
    lines = browser.find_element("id", "tip").text.splitlines()
    assert lines[0] == "2 tokens make this character"
    assert lines[1:3] == ["log-prob \u22120.500 · probability 60.7 %", "ratio learner / sampler 1.000"]
    assert token.get_attribute("class") == "lp s1"  # 9 * 0.5 / log 100 = 0.98
    choose(browser, "f-shade", "ratio")
    assert browser.find_element("css selector", ".tokens span").get_attribute("class") == ""


def test_light_and_dark(browser: Any) -> None:
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    click(browser, "theme")
    after = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    click(browser, "theme")
    assert {before, after} == {"rgb(246, 247, 249)", "rgb(13, 16, 21)"}


def test_a_narrow_window_needs_no_scrolling_sideways(browser: Any) -> None:
    command = "Emulation.setDeviceMetricsOverride"
    size = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd(command, {"width": 390, **size})
    widths = browser.execute_script(
        "const all = document.documentElement; return [all.scrollWidth, all.clientWidth]"
    )
    assert widths[0] == widths[1] <= 390  # less the bar to scroll down with
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_runs_are_overlaid_and_can_be_hidden(browser: Any, tmp_path: Path) -> None:
    """A page of its own, so this test comes last. The second run has lost its tokenizer."""
    from selenium.webdriver.support.ui import WebDriverWait

    runs: list[ActiveRun] = []
    for name, value in (("one", 1.0), ("two", 0.5)):
        rewards = {"right": value, "exact": 1.0}
        rows = [row(n, 0, s, "ab", rewards=rewards, reward=value) for n in range(2) for s in range(2)]
        runs.append(make_run(tmp_path / name, rows, name=name, seed=len(runs)))
    (tmp_path / "two" / "model" / "tokenizer.json").unlink()
    (tmp_path / "two.html").write_bytes(report.build(runs, None)[0])
    browser.get((tmp_path / "two.html").as_uri())
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script("return document.body.dataset.ready"))
    first = "return document.querySelector('.plot').data.map(trace => [trace.name, trace.y[0]])"
    assert browser.execute_script(first) == [["one", 1], ["two", 0.5]]
    heads = [element.text for element in browser.find_elements("css selector", "#summary th")]
    assert heads[1] == "seed"  # the key that differs
    assert heads[5:9] == ["Pass rate of right, last", "Held-out pass@1 of right, last", "best", "KL, last"]
    cells = [element.text for element in browser.find_elements("css selector", "#summary td")]
    assert (cells[1], cells[5]) == ("0", "100 %")
    assert (cells[len(heads) + 1], cells[len(heads) + 5]) == ("1", "0 %")  # 0.5 is below the threshold of 1
    browser.execute_script("document.querySelector('#legend button').click()")
    assert browser.execute_script(first) == [["two", 0.5]]
    table = browser.find_element("css selector", "table.config").text
    assert table.splitlines() == ["one two", "seed 0 1"]  # what differs, and nothing else
    choose(browser, "f-run", "1")
    assert found(browser) == "4 of 4 rollouts in 2 groups"
    assert browser.find_element("css selector", ".tokens").text == "ab"
    assert "no tokenizer.json is where" in browser.find_element("id", "shade-legend").text
