"""ctrf.json: its schema, its counts, and ids that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from parity.report import ctrf
from tests.parity.example_runs import RUN, cells_of, one_of_each, rerun

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "ctrf.subset.json").read_text())
CHECKER = jsonschema.Draft7Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


@pytest.fixture
def document() -> dict[str, Any]:
    """Give a run with a cell of each verdict."""
    return json.loads(json.dumps(ctrf.document(cells_of(one_of_each()), RUN, rerun)))  # type: ignore[no-any-return]


def test_the_document_follows_the_published_schema(document: dict[str, Any]) -> None:
    """Every verdict is written in a way that readers of the format accept."""
    CHECKER.validate(document)


@pytest.mark.parametrize("key", ["reportFormat", "specVersion", "results"])
def test_the_schema_refuses_a_document_without(document: dict[str, Any], key: str) -> None:
    """The check can fail."""
    del document[key]
    assert not CHECKER.is_valid(document)


def test_the_schema_refuses_fractions_of_a_millisecond(document: dict[str, Any]) -> None:
    """Times are whole numbers."""
    document["results"]["tests"][0]["duration"] = 0.5
    assert not CHECKER.is_valid(document)


def test_counts_add_up(document: dict[str, Any]) -> None:
    """Fail, leak and error are failed; start and stop are milliseconds of the run."""
    summary = document["results"]["summary"]
    assert {k: summary[k] for k in ("tests", "passed", "failed", "skipped", "other")} == {
        "tests": 5, "passed": 1, "failed": 3, "skipped": 1, "other": 0,
    }  # fmt: skip
    assert summary["start"] == 1772330400000  # 2026-03-01T02:00:00Z
    assert summary["stop"] - summary["start"] == 12500


def test_a_failing_test_says_why_and_how_to_run_it(document: dict[str, Any]) -> None:
    """The message is the finding, the trace ends with the one command."""
    test = document["results"]["tests"][0]
    assert (test["status"], test["rawStatus"]) == ("failed", "fail")
    assert test["message"] == "expert gradient x2.000 = tp"
    assert test["trace"].endswith("rerun: parity run w4-tp2-ep4-sgd-fp32")
    assert test["labels"]["shape.tp"] == 2


def test_an_id_stays_from_run_to_run(document: dict[str, Any]) -> None:
    """Another run at another commit gives a cell the same id, and other cells others."""
    again = ctrf.document(cells_of(one_of_each()), {**RUN, "commit": "fff"}, rerun)
    ids = [test["id"] for test in document["results"]["tests"]]
    assert [test["id"] for test in again["results"]["tests"]] == ids
    assert len(set(ids)) == 5


def test_a_run_without_run_json_has_a_document() -> None:
    """A crash that left nothing but rows can still be reported."""
    CHECKER.validate(ctrf.document(cells_of(one_of_each()), {}, rerun))
