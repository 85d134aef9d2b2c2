"""Rows, verdicts, and the run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from parity.case import Case
from parity.case_files import select
from parity.errors import UsageError
from parity.store import Row, RunDirectory, by_case, case_verdict
from tests.parity.example_rows import passing, row, scaled

CASES = Path(__file__).resolve().parents[2] / "cases"
KEYS = [
    "schema", "case", "implementation", "shape", "engine", "against", "quantity", "family",
    "tensor", "step", "ratio", "scale", "residual", "error", "threshold", "verdict", "causes",
    "worst", "seconds",
]  # fmt: skip


@pytest.fixture
def case() -> Case:
    """Give one case of the shipped suite."""
    return select(["w8-tp4-ep2-gas2-clip-adam-fp32"], folder=CASES)[0]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Give an empty run directory."""
    return RunDirectory.create(tmp_path / "run", root=tmp_path, commit="abc")


def test_a_row_has_the_published_keys_in_order(case: Case) -> None:
    """One line of results.jsonl holds exactly the keys others rely on."""
    written = json.loads(row(case).to_json())
    assert list(written) == KEYS
    assert written["shape"] == {
        "world": 8, "pp": 1, "tp": 4, "dp": 2, "ep": 2, "etp": 1, "edp": 4,
    }  # fmt: skip
    assert written["engine"] == {
        "name": "native", "zero": 0, "gas": 2, "clip": 0.5, "dtype": "float32",
        "optimizer": "adam", "backend": "gloo", "strategy": "route_full",
    }  # fmt: skip


def test_rows_survive_the_way_to_disk_and_back(run: RunDirectory, case: Case) -> None:
    """What is appended is what is read, optional keys included."""
    skipped = Row.of_case(case, "mine", verdict="skipped", reason="no", detail={"rank": 1})
    rows = [*scaled(case), skipped]
    run.append(rows[:3])
    run.append(rows[3:])
    assert run.rows() == rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["ratio", "scale", "residual", "error"])
def test_what_is_not_finite_never_passes(case: Case, metric: str, bad: float) -> None:
    """A metric that is no number is written as null, and its row fails and says so."""
    broken: dict[str, Any] = {metric: bad}
    found = row(case, **broken)
    assert (getattr(found, metric), found.verdict) == (None, "fail")
    assert found.reason == f"not finite: {metric}"
    assert json.loads(found.to_json())[metric] is None
    assert row(case, **broken, verdict="skipped", reason="why").verdict == "skipped"


def test_details_that_are_not_finite_are_text(case: Case) -> None:
    """Strict JSON holds everywhere in a row, and nothing is lost."""
    text = row(case, detail={"values": [math.inf, 1.0], 3: math.nan}).to_json()
    assert json.loads(text)["detail"] == {"values": ["inf", 1.0], "3": "nan"}


def test_an_unknown_verdict_is_a_defect(case: Case) -> None:
    """A row cannot carry a verdict no report knows."""
    with pytest.raises(AssertionError, match="'maybe' is not one of"):
        row(case, verdict="maybe")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "fail", "error"], "error"),
        (["pass", "fail", "leak"], "fail"),
        (["leak", "pass"], "leak"),
        (["skipped", "pass"], "pass"),
        (["skipped"], "skipped"),
        ([], "error"),
    ],
)
def test_the_worst_row_decides_a_case(case: Case, verdicts: list[str], expected: str) -> None:
    """An error wins over a failure, and a skip decides only where all is skipped."""
    rows = [row(case, verdict=verdict) for verdict in verdicts]
    assert case_verdict(rows) == expected


def test_a_line_cut_off_is_no_row(run: RunDirectory, case: Case) -> None:
    """The rows before a crash are read; the half line at the end is not."""
    run.append(passing(case)[:2])
    with run.results.open("a") as file:
        file.write('{"schema": 1, "case": "w8')
    assert run.rows() == passing(case)[:2]


def test_a_bad_line_is_refused_by_number(run: RunDirectory, case: Case) -> None:
    """A whole line that is no row names file and line."""
    run.append(passing(case)[:1])
    text = run.results.read_text().splitlines()[0]
    good = json.loads(text)
    changed: list[dict[str, Any]]
    changed = [{"verdict": "ok"}, {"shape": None}, {"shape": {}}, {"error": "x"}, {"causes": 1}]
    bads = ["{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": "\udcff"}']
    for bad in [*bads, *(json.dumps({**good, **change}) for change in changed)]:
        whole = f"{text}\n{bad}\n"
        run.results.write_bytes(whole.encode(errors="surrogateescape"))
        with pytest.raises(UsageError, match=r"results\.jsonl:2: "):
            run.rows()


def test_resuming_drops_errored_and_unfinished_cases(run: RunDirectory) -> None:
    """Finished cases stay; an errored one, and the one a crash cut off, are done again."""
    good, bad, last = select(["w4-tp2-ep4-*"], folder=CASES)[:3]
    run.append(passing(good))
    run.append([Row.of_case(bad, "fold_impl", verdict="error", reason="died")])
    run.append(passing(last))
    assert list(by_case(run.keep_finished())) == [good.id, last.id]
    with run.results.open("a") as file:
        file.write('{"schema"')
    assert list(by_case(run.keep_finished())) == [good.id]
    assert run.rows() == passing(good)


def test_default_directories_are_named_and_linked(tmp_path: Path) -> None:
    """Two runs in one second get two directories, and `latest` is the one linked last."""
    root = tmp_path / "reports"
    runs = [RunDirectory.create(root=root, commit="abc1234") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all("-abc1234" in run.path.name for run in runs)
    for run in runs:
        run.link_latest()
    assert (root / "latest").resolve() == runs[-1].path.resolve()
    assert (root / "latest").readlink() == Path(runs[-1].path.name)


def test_a_real_file_named_latest_is_left_alone(tmp_path: Path) -> None:
    """The link never replaces something of the user's."""
    (tmp_path / "latest").mkdir()
    RunDirectory.create(root=tmp_path, commit="abc").link_latest()
    assert not (tmp_path / "latest").is_symlink()


def test_results_are_never_mixed(tmp_path: Path) -> None:
    """A directory with results is refused as the target of another run."""
    RunDirectory.create(tmp_path / "run", root=tmp_path, commit="abc").release()
    with pytest.raises(UsageError, match="holds results already, go on with parity run --resume"):
        RunDirectory.create(tmp_path / "run", root=tmp_path, commit="abc")
    with pytest.raises(UsageError, match="no run directory"):
        RunDirectory.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        RunDirectory.create(tmp_path / "file" / "run", root=tmp_path, commit="abc")


def test_discarding_removes_only_what_is_empty(run: RunDirectory, case: Case) -> None:
    """A refused run leaves nothing behind, one with rows stays."""
    run.write_run({"state": "running"})
    run.append(passing(case))
    run.discard()
    assert run.rows()
    run.results.write_text("")
    run.discard()
    assert not run.path.exists()


def test_run_json_is_strict(run: RunDirectory) -> None:
    """run.json holds no NaN; a missing one reads as empty, what is none is refused by file."""
    assert run.run() == {}
    run.write_run({"seconds": {"total": math.nan}, "path": Path("x")})
    assert run.run() == {"seconds": {"total": "nan"}, "path": "x"}
    for text, says in {
        "{": "cannot be read",
        "[]": "no record of a run",
        '{"selection": "x"}': "selection: Input should be",
        '{"selection": {"files": ["x"]}}': "selection.files: Input should be",
        '{"started": "yesterday"}': "started: Input should be",
        '{"versions": 3}': "versions: Input should be",
    }.items():
        (run.path / "run.json").write_text(text)
        with pytest.raises(UsageError, match=rf"run\.json: .*{says}"):
            run.run()


def test_one_process_writes_a_directory(run: RunDirectory, case: Case) -> None:
    """Whoever comes second is told so, until the first one is done; reading is free."""
    run.append(passing(case))
    other = RunDirectory.open(run.path)
    with pytest.raises(UsageError, match="is being written by another run"):
        other.hold()
    with pytest.raises(UsageError, match="is being written by another run"):
        RunDirectory.create(run.path, root=run.path.parent, commit="abc")
    assert other.rows() == passing(case)
    run.release()
    other.hold()


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    """What was opened by `latest` is its run, and linking it again links no link to itself."""
    run = RunDirectory.create(root=tmp_path, commit="abc")
    run.link_latest()
    opened = RunDirectory.open(tmp_path / "latest")
    opened.link_latest()
    assert opened.path == run.path.resolve()
    assert (tmp_path / "latest").readlink() == Path(run.path.name)


def test_text_that_is_no_text_is_written(run: RunDirectory) -> None:
    """A lone surrogate in a message is shown by its number."""
    run.write("report.md", "a \ud800 b")
    assert (run.path / "report.md").read_text() == "a \\ud800 b"


def test_rows_share_what_they_have_in_common(tmp_path: Path) -> None:
    """Equal shapes and engines are one object, whatever a later writer put into them."""
    directory = RunDirectory.create(tmp_path / "out", root=tmp_path, commit="c")
    case = select(["w4-tp2-ep4-clip-sgd-fp32"])[0]
    engine = {**row(case).engine, "options": {"x": 1}}
    directory.append([row(case, engine=engine), row(case, engine=dict(engine)), row(case)])
    one, two, other = directory.rows()
    assert one.engine is two.engine == engine
    assert one.shape is two.shape is other.shape
    assert other.engine != engine
    assert one.case is two.case
