"""The report in a browser: it draws every chart without a network, its legend toggles, its table sorts."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lookfar.study.report import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER) and "CI" not in os.environ:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver  # noqa: E402  # not needed where the module is skipped
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,1000"),
)
PERPLEXITIES = {
    "alibi": {64: 5.2, 128: 5.1, 256: 5.0},
    "kerple + dape_v2": {64: 4.9, 128: 4.8, 256: 4.7},
    "rope": {64: 5.1, 128: 9.0, 256: 14.0},
    "sinusoidal": {64: 5.5, 128: 90.0, 256: float("nan")},
}


def write_run(folder: Path, scheme: str, seed: int) -> None:
    folder.mkdir(parents=True)
    about = {"run": folder.name, "scheme": scheme, "seed": seed, "data": "text@1", "context": 64, "unit": "byte"}
    rows = [
        {
            **about,
            "protocol": protocol,
            "length": length,
            "metric": "perplexity",
            "value": value + seed / 9,
            "count": 99,
        }
        for protocol in ("non_overlapping", "sliding")
        for length, value in PERPLEXITIES[scheme].items()
    ]
    losses = [{"update": update, "loss": 5 / update**0.3} for update in range(1, 60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, losses)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for number, scheme in enumerate(PERPLEXITIES):
        for seed in (0, 1):
            write_run(folder / f"run{number}-s{seed}", scheme, seed)
    return write_report([folder])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    assert BROWSER and DRIVER, "chromium and chromedriver must be installed where CI is set"
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    """A browser that has just drawn the page, its logs empty but for what the page did."""
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(page.as_uri())
    until(chromium, lambda: chromium.execute_script("return document.documentElement.dataset.drawn") == "true")
    return chromium


def until(browser: webdriver.Chrome, true: Callable[[], object]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: true())


def key(browser: webdriver.Chrome, series: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f'.legend [data-series="{series}"]')


def drawn(browser: webdriver.Chrome, series: str) -> int:
    """How many points, lines and labels of a series stand in the charts."""
    labels = (
        "return [...document.querySelectorAll('.chart [aria-label]')].map((each) => each.getAttribute('aria-label'))"
    )
    return sum(f"series: {series};" in f"{label};" for label in browser.execute_script(labels))


def first_column(browser: webdriver.Chrome) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "tbody td:first-child")]


def test_every_chart_is_drawn_without_an_error_and_without_a_network(browser: webdriver.Chrome) -> None:
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
    assert len(charts) == 3  # two protocols and the loss
    for chart in charts:
        size = chart.find_element(By.TAG_NAME, "svg").size
        assert size["width"] > 300 and size["height"] > 300
        assert len(chart.find_elements(By.CSS_SELECTOR, "svg path")) > 10
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url.startswith(("http", "ws", "//"))] == []
    assert any(url.endswith("report.html") for url in asked)


def test_a_click_in_the_legend_hides_a_scheme_in_every_chart_and_another_shows_it(browser: webdriver.Chrome) -> None:
    before = {series: drawn(browser, series) for series in PERPLEXITIES}
    assert all(count > 5 for count in before.values())
    key(browser, "rope").click()
    until(browser, lambda: drawn(browser, "rope") == 0)
    assert drawn(browser, "alibi") == before["alibi"]
    assert key(browser, "rope").get_attribute("aria-pressed") == "false"
    key(browser, "rope").click()
    until(browser, lambda: drawn(browser, "rope") == before["rope"])


def test_a_shift_click_shows_one_scheme_alone_and_show_all_brings_back_the_rest(browser: webdriver.Chrome) -> None:
    alone = key(browser, "kerple + dape_v2")
    ActionChains(browser).key_down(Keys.SHIFT).click(alone).key_up(Keys.SHIFT).perform()
    until(browser, lambda: drawn(browser, "alibi") == drawn(browser, "rope") == 0)
    assert drawn(browser, "kerple + dape_v2") > 5
    browser.find_element(By.CSS_SELECTOR, ".legend .all").click()
    until(browser, lambda: drawn(browser, "alibi") > 5)


def test_a_pointer_on_the_legend_fades_the_other_schemes(browser: webdriver.Chrome) -> None:
    def faded() -> int:
        return len(browser.find_elements(By.CSS_SELECTOR, '.chart path[opacity="0.12"]'))

    assert faded() == 0
    ActionChains(browser).move_to_element(key(browser, "alibi")).perform()
    until(browser, lambda: faded() > 5)


def test_a_pointer_on_a_point_tells_the_numbers(browser: webdriver.Chrome) -> None:
    points = browser.find_elements(By.CSS_SELECTOR, ".chart path[aria-label*='series: alibi'][aria-label*='by seed']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", points[0])
    ActionChains(browser).move_to_element(points[0]).perform()
    until(browser, lambda: browser.find_element(By.ID, "vg-tooltip-element").is_displayed())
    told = browser.find_element(By.ID, "vg-tooltip-element").text
    assert "0: 5.20000, 1: 5.31111" in told
    assert "99" in told


def test_a_click_on_a_head_sorts_the_table_and_another_turns_it_round(browser: webdriver.Chrome) -> None:
    assert first_column(browser) == sorted(PERPLEXITIES)
    last = browser.find_elements(By.CSS_SELECTOR, "th[data-column] button")[7]  # non-overlapping at 4×
    last.click()
    assert first_column(browser) == ["kerple + dape_v2", "alibi", "rope", "sinusoidal"]
    last.click()
    assert first_column(browser) == ["rope", "alibi", "kerple + dape_v2", "sinusoidal"]  # what is no number stays last
    heads = browser.find_elements(By.CSS_SELECTOR, "th[data-column]")
    assert [head.get_attribute("aria-sort") for head in heads if head.get_attribute("aria-sort")] == ["descending"]


@pytest.mark.parametrize("width", [400, 820, 1600])
def test_the_page_fits_every_window(browser: webdriver.Chrome, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )

    def fits() -> bool:
        wide = "return Math.max(...[...document.querySelectorAll('.chart svg')].map((svg) => svg.clientWidth))"
        return (
            browser.execute_script("return document.documentElement.scrollWidth") <= width
            and 200 < browser.execute_script(wide) <= width
        )

    until(browser, fits)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# A study of tasks


@pytest.fixture(scope="module")
def page_of_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for scheme, reach in {"nope": 14, "rope": 10, "alibi": 8}.items():
        for seed in (0, 1, 2):
            for task in ("copy", "sort(digits=multi)"):
                write_answers(folder / f"{scheme}-{task[:4]}-s{seed}", scheme, task, seed, reach + seed)
    return write_report([folder])


def write_answers(folder: Path, scheme: str, task: str, seed: int, reach: int) -> None:
    folder.mkdir(parents=True)
    about = {"run": folder.name, "scheme": scheme, "seed": seed, "data": task, "context": 64, "protocol": "greedy"}
    rows = [
        {
            **about,
            "checkpoint": checkpoint,
            "length": length,
            "metric": "accuracy",
            "value": float(length <= reach),
            "count": 50,
            "trained": 10,
            "split": "longer" if length > 10 else "held_out",
        }
        for checkpoint in ("last", "best")
        for length in range(2, 21, 2)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def marks(browser: webdriver.Chrome, colour: str) -> int:
    """How many paths of a colour stand in the charts."""
    return len(browser.find_elements(By.CSS_SELECTOR, f'.chart path[fill="{colour}"], .chart path[stroke="{colour}"]'))


def test_accuracies_are_drawn_told_and_hidden_by_a_click(chromium: webdriver.Chrome, page_of_tasks: Path) -> None:
    chromium.get_log("browser")
    chromium.get(page_of_tasks.as_uri())
    until(chromium, lambda: chromium.execute_script("return document.documentElement.dataset.drawn") == "true")
    assert len(chromium.find_elements(By.CSS_SELECTOR, ".chart")) == 3  # two tasks and the ranking
    text = chromium.find_element(By.TAG_NAME, "main").text
    assert "3 schemes, 18 runs, 2 tasks, answered up to 2 times the trained length." in text
    assert "trained up to 10" in text and "mean reciprocal rank" in text
    (line,) = chromium.find_elements(By.CSS_SELECTOR, 'tbody tr[data-series="nope"]')
    assert line.text.split()[1:3] == ["1.00", "±"]
    key_of = {name: key(chromium, name) for name in ("nope", "rope", "alibi")}
    colour = key_of["rope"].find_element(By.CSS_SELECTOR, "svg path").get_attribute("stroke")
    before = marks(chromium, colour)
    assert before > 10
    key_of["rope"].click()
    until(chromium, lambda: marks(chromium, colour) == 0)
    assert line.is_displayed() and marks(chromium, "#316ddc") > 5
    key_of["rope"].click()
    until(chromium, lambda: marks(chromium, colour) == before)
    assert chromium.get_log("browser") == []
