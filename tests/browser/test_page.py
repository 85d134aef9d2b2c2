"""report.html in headless Chromium: it filters, answers clicks and keys, and is quick.

Needs Chromium, its driver and selenium; `make browser` installs them. Without them these tests are
skipped, unless PARITY_NEEDS_BROWSER is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity.known import Assessment
from parity.report import html
from parity.store import Row
from tests.parity.example_runs import RUN, cells_of, headline, many, one_of_each, rerun

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PHONE, DESK = (390, 844), (1400, 1000)
FAILING = "w4-tp2-ep4-sgd-fp32"
PATIENCE_S = 20.0


def _missing() -> str | None:
    """Say what the browser tests lack."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "chromium and chromedriver are not installed"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Start one browser for all tests."""
    if missing := _missing():
        assert not os.environ.get("PARITY_NEEDS_BROWSER"), missing
        pytest.skip(f"{missing}: make browser")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """One opened report."""

    def __init__(self, browser: Chrome, file: Path) -> None:
        self.browser, self.file = browser, file

    def open(self, size: tuple[int, int] = DESK, scheme: str = "light", fragment: str = "") -> Page:
        """Load the page in a window of a size and colour scheme; wait for its script to end.

        The driver may answer while the tab still changes over from the page before.
        """
        from selenium.webdriver.support.wait import WebDriverWait

        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get("about:blank")
        self.browser.get(self.file.as_uri() + fragment)
        is_ready = "return document.documentElement.dataset.ready === 'true'"
        WebDriverWait(self.browser, PATIENCE_S).until(lambda _: self.js(is_ready))
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script."""
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """Read the visible text of the first match."""
        return str(self.find(selector).text)

    def find(self, selector: str) -> Any:
        """Find the first match."""
        return self.browser.find_element("css selector", selector)

    def choose(self, name: str, word: str) -> None:
        """Choose from a filter as a user does."""
        from selenium.webdriver.support.select import Select

        Select(self.find(f"[name={name}]")).select_by_visible_text(word)

    def ids(self) -> list[str]:
        """List the cells in the table."""
        found = self.browser.find_elements("css selector", "#cells .id")
        return [element.text for element in found]

    def heat(self, label: str) -> Any:
        """Find a cell of a heat map by the beginning of its label."""
        return self.find(f'.heat[aria-label^="{label}"]')

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Write a page."""
    path.write_text(html.render(cells_of(rows), RUN, rerun, headline(rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a run with a cell of each verdict."""
    return write(tmp_path_factory.mktemp("page") / "report.html", one_of_each())


@pytest.fixture
def page(browser: Chrome, file: Path) -> Page:
    """Open the page of a run with a cell of each verdict."""
    return Page(browser, file).open()


def test_it_opens_without_a_complaint(page: Page) -> None:
    """No error in the console, nothing asked from anywhere, the headline in sight."""
    log = page.browser.get_log("browser")
    assert [entry for entry in log if entry["level"] == "SEVERE"] == []
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.text("h1").startswith("2 of 5 cells failed: expert gradient x2.000 = tp on 1 shape")
    assert page.text("#shown") == "5 of 5 cells"


def test_filters_narrow_cells_and_maps(page: Page) -> None:
    """Each filter leaves what has that verdict, family, optimizer; `Show all` brings all back."""
    page.choose("verdict", "leak")
    assert page.ids() == ["w8-tp2-ep4-sgd-fp32"]
    page.find("button[type=reset]").click()
    page.js("return new Promise(done => setTimeout(done))")  # the form is reset after the click
    assert page.text("#shown") == "5 of 5 cells"
    page.choose("optimizer", "adam")
    assert page.ids() == ["w8-tp4-ep2-adam-fp32"]
    page.choose("optimizer", "any")
    page.choose("family", "router")
    columns = page.js("return [...document.querySelectorAll('.maps svg > text.soft')]"
                      ".map(e => e.textContent).filter(t => t !== '·')")  # fmt: skip
    assert columns == ["router"]
    page.choose("verdict", "fail")  # of the router: its replicas differ
    assert page.ids() == [FAILING]
    page.choose("quantity", "gradient")  # the router's gradient is right
    assert page.ids() == []


def test_known_findings_stand_beside_their_cells(browser: Chrome, tmp_path: Path) -> None:
    """A known cell has its number and comes last; `new failures` leaves it out."""
    rows = one_of_each()
    known = Assessment(marks={FAILING: ("0042",)}, notes=("0007 does not show",))
    text = html.render(cells_of(rows), RUN, rerun, headline(rows), known)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = Page(browser, tmp_path / "report.html").open()
    assert page.text("header .note") == "0007 does not show"
    assert page.ids()[-1] == FAILING
    assert page.text("#cells .known") == "0042"
    page.choose("verdict", "new failures")
    assert page.ids() == ["w8-tp4-ep4-sgd-fp32", "w8-tp2-ep4-sgd-fp32"]


def test_text_filters_ids(page: Page) -> None:
    """Part of an id is enough."""
    page.find("[name=text]").send_keys("TP4-EP4")
    assert page.ids() == ["w8-tp4-ep4-sgd-fp32"]


def test_the_map_says_what_is_wrong(page: Page) -> None:
    """A failing place shows its factor, a passing one its share of the allowed error."""
    assert page.heat("w4 tp2 ep4, expert").text.startswith("×2.000")
    assert "leak" in page.heat("w8 tp2 ep4, router").text
    assert "2.6 %" in page.heat("w8 tp4 ep2, expert").text
    assert "error" in page.heat("w8 tp4 ep4, router").text


def test_a_click_on_the_map_chooses_cells(page: Page) -> None:
    """The table shows that shape; a second click takes the choice back."""
    page.heat("w4 tp2 ep4, expert").click()
    assert page.ids() == [FAILING]
    assert page.text("#chosen").startswith("w4 tp2 ep4, native, expert:")
    page.heat("w4 tp2 ep4, expert").click()
    assert len(page.ids()) == 5


def test_a_cell_opens_with_everything(page: Page) -> None:
    """Metrics, causes, both pictures and the rerun command can be read, and Esc closes."""
    from selenium.webdriver.common.keys import Keys

    page.js("document.querySelectorAll('#cells .id')[1].click()")
    body = page.text("#cell-body")
    assert "Causes that fit: tp" in body
    assert f"parity run {FAILING}" in body
    assert "expert gradient layers.0.expert: folded run against reference" in body
    lines = [line for line in body.splitlines() if line.startswith("gradient expert folded ref")]
    assert lines
    assert "2.000000" in lines[0]
    pictures = page.js(
        "return [...document.querySelectorAll('#cell-body svg')]"
        ".map(s => s.getAttribute('aria-label'))"
    )
    of_experts = "0 2.000, 1 no gradient, 2 1.000, 3 2.000"
    assert f"scale of each expert, layers.0.expert: {of_experts}" in pictures
    assert "replicas: A: ranks 0 2; B: ranks 1 3" in pictures
    assert page.js("return location.hash") == f"#cell={FAILING}"
    page.keys(Keys.ESCAPE)
    assert page.js("return document.querySelector('dialog').open") is False
    assert page.js("return location.hash") == ""


def test_a_link_leads_to_a_cell(browser: Chrome, file: Path) -> None:
    """A page opened with #cell=ID shows that cell at once; an errored one has its traceback."""
    page = Page(browser, file).open(fragment="#cell=w8-tp4-ep4-sgd-fp32")
    body = page.text("#cell-body")
    assert "rank 3 hung in all_reduce at dispatch.py:211" in body
    assert 'File "dispatch.py", line 211, in restore' in body


def test_keys_are_enough(page: Page) -> None:
    """Arrows walk the map, Enter chooses and moves to the cell, Enter opens it."""
    from selenium.webdriver.common.keys import Keys

    page.js("document.querySelector('.heat[tabindex=\"0\"]').focus()")
    labels = []
    for key in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT):
        page.keys(key)
        labels.append(page.js("return document.activeElement.getAttribute('aria-label')"))
    assert labels[0].startswith("w4 tp2 ep4, router")
    assert labels[1].startswith("w4 tp2 ep4, expert")
    page.keys(Keys.ENTER)
    assert page.js("return document.activeElement.textContent") == FAILING
    page.keys(Keys.ENTER)
    assert page.text("#cell-title").endswith(FAILING)
    outline = page.js("return document.activeElement.closest('dialog') !== null")
    assert outline is True


@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_everywhere(
    browser: Chrome, file: Path, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    """The page never scrolls sideways, and text has contrast in both colour schemes."""
    page = Page(browser, file).open(size, scheme)
    assert page.js("return document.documentElement.scrollWidth") <= size[0]
    for selector in ("body", ".soft, .kicker", ".tag.fail", ".tag.pass", ".tag.error", ".tag.leak"):
        assert page.js(_CONTRAST, selector) >= 4.5, selector
    page.js("document.querySelectorAll('#cells .id')[1].click()")
    assert page.js("return document.querySelector('dialog').scrollWidth") <= size[0]
    folder = Path(os.environ.get("PARITY_SCREENSHOTS", tmp_path))
    browser.save_screenshot(str(folder / f"cell-{size[0]}-{scheme}.png"))
    page.js("document.querySelector('dialog').close()")
    browser.save_screenshot(str(folder / f"page-{size[0]}-{scheme}.png"))


_CONTRAST = """
const made = document.querySelector(arguments[0]), style = getComputedStyle(made);
const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = (text) => { const [r, g, b] = rgb(text).map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
let at = made;
const isClear = (made) => /rgba\\(0, 0, 0, 0\\)/.test(getComputedStyle(made).backgroundColor);
while (at && isClear(at)) at = at.parentElement;
const back = light(getComputedStyle(at ?? document.body).backgroundColor);
const ink = light(style.fill && made.namespaceURI.endsWith('svg') ? style.fill : style.color);
return (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
"""


def test_two_thousand_cells_are_quick(browser: Chrome, tmp_path: Path) -> None:
    """2,000 cells open and filter in less than a second of the page's thread.

    Seconds of its own processor time: on a machine that does other things too, those of the clock
    say nothing about the page. Both are printed.
    """
    file = write(tmp_path / "many.html", many(2000))
    page = Page(browser, tmp_path / "none.html")
    page.file.write_text("<!doctype html><html data-ready='true'>")
    page.open()
    browser.execute_cdp_cmd("Performance.enable", {})
    before = _thread_s(browser)
    page.file = file
    page.open()
    opened = _thread_s(browser) - before
    clock = page.js("return performance.timing.domComplete - performance.timing.navigationStart")
    before = _thread_s(browser)
    waited = page.js(
        "const form = document.querySelector('#filters'), start = performance.now();"
        "form.elements.verdict.value = 'bad';"
        "form.dispatchEvent(new Event('input', {bubbles: true}));"
        "document.body.getBoundingClientRect(); return performance.now() - start"
    )
    filtered = _thread_s(browser) - before
    assert page.text("#shown") == "50 of 2000 cells"
    print(f"opened in {opened:.3f} s ({clock} ms), filtered in {filtered:.3f} s ({waited:.0f} ms)")
    assert 0 < opened < 1
    assert 0 < filtered < 1


def _thread_s(browser: Chrome) -> float:
    """Read how long the page's main thread has computed."""
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "ThreadTime"))
