"""report.html as text and data; how it behaves in a browser is in tests/browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from parity.report import html
from parity.store import Row
from tests.parity.example_rows import THRESHOLD, passing, row
from tests.parity.example_runs import (
    RUN,
    case_of,
    cells_of,
    errored,
    headline,
    many,
    one_of_each,
    pictured,
    rerun,
)


def page_of(rows: list[Row]) -> str:
    """Render rows."""
    return html.render(cells_of(rows), RUN, rerun, headline(rows))


def island_of(page: str) -> dict[str, Any]:
    """Read the data back as the page's script does."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_needs_no_network() -> None:
    """Nothing in the file is loaded from anywhere, and the browser is told to refuse it."""
    page = page_of(one_of_each())
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\s\"')]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<(link|img|iframe|script)\b[^>]*\b(src|href)=", page)


def test_text_of_a_run_never_becomes_markup() -> None:
    """A reason that closes the script, or brings an element, stays text."""
    evil = "</script><img src=x onerror=alert(1)><!-- \u2028 &amp; {{ 7 * 7 }}"
    page = page_of(errored(case_of(4, 2, 4), evil))
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "{{ 7 * 7 }}" in page  # and never a template
    assert island_of(page)["words"]["reason"] == [evil]


def test_failing_cells_come_first_and_are_told_in_full() -> None:
    """Order: error, fail, leak, pass, skipped; a failing one carries numbers, causes, pictures."""
    data = island_of(page_of(one_of_each()))
    words, found = data["words"], data["cells"]
    verdicts = [words["verdict"][cell[6]] for cell in found]
    assert verdicts == ["error", "fail", "leak", "pass", "skipped"]
    failing = found[1]
    assert failing[0] == "w4-tp2-ep4-sgd-fp32"
    assert [words["cause"][i] for i in failing[7]] == ["tp"]
    assert failing[10] == "parity run w4-tp2-ep4-sgd-fp32"
    told = failing[13]
    assert told[0]["expert_scales"] == [2, None, 1, 2]
    assert any(bad.get("classes") == [[0, 2], [1, 3]] for bad in told)
    assert found[0][13][0]["trace"].startswith("Traceback")


def test_an_entry_is_the_worst_row_of_its_place() -> None:
    """Of several tensors the failing one shows, of passing ones the one nearest its threshold."""
    case = case_of(4, 2, 4)
    near = row(case, error=2e-6, scale=1.000002, tensor="layers.1.router")
    data = island_of(page_of([*passing(case), near]))
    words = data["words"]
    entries = {(words["quantity"][e[0]], words["family"][e[1]], words["against"][e[3]]): e
               for e in data["cells"][0][12]}  # fmt: skip
    router = entries["gradient", "router", "reference"]
    assert (router[5], router[6], router[7]) == (2, 1.000002, 2e-6)
    assert router[8] == pytest.approx(THRESHOLD)
    assert words["tensor"][router[11]] == "layers.1.router"
    bad = row(case, error=1e-5, verdict="fail", scale=1.0, tensor="layers.2.router")
    data = island_of(page_of([*passing(case), near, bad]))
    router = next(e for e in data["cells"][0][12] if e[4] == data["words"]["verdict"].index("fail"))
    assert data["words"]["tensor"][router[11]] == "layers.2.router"


def test_the_baseline_run_is_told_apart() -> None:
    """A row of the baseline's own shape belongs to the same cell under another name."""
    data = island_of(page_of(passing(case_of(4, 2, 4))))
    assert len(data["cells"]) == 1
    assert set(data["words"]["run"]) == {"folded", "baseline"}


def test_two_implementations_are_two_cells() -> None:
    """One case judged twice stands twice, so that the filter has something to choose."""
    rows = passing(case_of(4, 2, 4))
    other = [replace(r, implementation="deepspeed") for r in rows]
    assert len(island_of(page_of([*rows, *other]))["cells"]) == 2


def test_without_script_the_failing_cells_can_be_read() -> None:
    """The headline and the failing cells stand in plain HTML."""
    page = page_of(one_of_each())
    plain = page[page.index("<noscript>") : page.index("</noscript>")]
    assert "<code>w4-tp2-ep4-sgd-fp32</code>: fail: expert gradient x2.000 = tp" in plain


def test_few_rows_of_a_failing_cell_are_told() -> None:
    """A cell with hundreds of failing rows tells eight, with a picture if there is one."""
    case = case_of(4, 2, 4)
    bad = [row(case, verdict="fail", error=1.0, tensor=f"t{i}") for i in range(300)]
    cell = island_of(page_of([*bad, *pictured(case)]))["cells"][0]
    assert (len(cell[13]), cell[14]) == (8, 300 + 4)
    assert "expert_scales" in cell[13][0]


def test_two_thousand_cells_stay_small() -> None:
    """Size grows with cells, not rows: 2,000 cells of 33 entries stay below 10 MB."""
    page = page_of(many(2000))
    assert len(page.encode()) < 10_000_000
    assert len(island_of(page)["cells"]) == 2000
