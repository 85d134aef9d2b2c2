"""junit.xml: its schema, its properties, and what every verdict becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import xmlschema

from parity.report import junit
from tests.parity.example_runs import RUN, case_of, cells_of, errored, one_of_each, rerun

SCHEMA = Path(__file__).parent / "schemas" / "junit-10.subset.xsd"


@pytest.fixture(scope="module")
def schema() -> xmlschema.XMLSchema:
    """Give the schema that junit.xml must follow."""
    return xmlschema.XMLSchema(SCHEMA)


@pytest.fixture
def text() -> str:
    """Give a run with a cell of each verdict."""
    return junit.render(cells_of(one_of_each()), RUN, rerun)


def test_the_file_follows_the_published_schema(schema: xmlschema.XMLSchema, text: str) -> None:
    """Every verdict is written in a way that CI services accept."""
    schema.validate(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<failure", "<finding"),
        ('tests="1" ', ""),
        ("<testcase", '<testcase file="a.py"'),
        ("</testcase>", "<properties/></testcase>"),
    ],
)
def test_the_schema_refuses_what_it_should(
    schema: xmlschema.XMLSchema, text: str, old: str, new: str
) -> None:
    """Unknown elements, missing counts and properties inside a test case are refused."""
    closing = text.replace("<failure", "<finding").replace("</failure", "</finding")
    changed = closing if old == "<failure" else text.replace(old, new)
    assert changed != text
    with pytest.raises(xmlschema.XMLSchemaException):
        schema.validate(changed)


def test_verdicts_become_outcomes(text: str) -> None:
    """Fail and leak are failures, error is an error, skipped is skipped; each says why."""
    root = ElementTree.fromstring(text)
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors")} == {
        "tests": "5", "failures": "2", "errors": "1",
    }  # fmt: skip
    found: dict[str, Any] = {
        suite.attrib["name"]: [element.tag for case in suite.iter("testcase") for element in case]
        for suite in root
    }
    assert found == {
        "w4-tp2-ep4-sgd-fp32": ["failure"], "w8-tp2-ep4-sgd-fp32": ["failure"],
        "w8-tp4-ep4-sgd-fp32": ["error"], "w6-tp3-ep2-sgd-fp32": ["skipped"],
        "w8-tp4-ep2-adam-fp32": [],
    }  # fmt: skip
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.attrib == {"type": "fail", "message": "expert gradient x2.000 = tp"}
    assert failure.text
    assert "rerun: parity run w4-tp2-ep4-sgd-fp32" in failure.text
    error = root.find(".//error")
    assert error is not None
    assert error.text
    assert "dispatch.py" in error.text


def test_every_case_has_its_properties(text: str) -> None:
    """Shape, engine, verdict and the margin in use can be read by a machine."""
    suite = ElementTree.fromstring(text)[0]
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert properties["shape.tp"] == "2"
    assert properties["engine.optimizer"] == "sgd"
    assert (properties["verdict"], properties["causes"]) == ("fail", "tp")
    assert properties["commit"] == "abc123def"


def test_what_xml_cannot_hold_is_replaced(schema: xmlschema.XMLSchema) -> None:
    """Colours of a terminal and markup in a traceback do not break the file."""
    reason = "\x1b[31mrank 1 said <b>&\x00</b>]]>"
    text = junit.render(cells_of(errored(case_of(4), reason)), RUN, rerun)
    schema.validate(text)
    error = ElementTree.fromstring(text).find(".//error")
    assert error is not None
    assert error.attrib["message"] == "\ufffd[31mrank 1 said <b>&\ufffd</b>]]>"


def test_no_cell_is_a_valid_file(schema: xmlschema.XMLSchema) -> None:
    """A run that was stopped before its first case still has a report."""
    schema.validate(junit.render([], {}, rerun))
