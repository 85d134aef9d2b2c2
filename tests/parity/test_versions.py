"""One suite on several versions of a package: environments, runs, the table."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from packaging.requirements import Requirement

from parity import cli, versions
from parity.environments import InstallationError, prepare, versions_of
from parity.errors import UsageError
from parity.session import Selection
from parity.versions import Column, lines_of
from tests.parity.example_rows import passing
from tests.parity.example_runs import case_of, directory

TRAINER = """
from fold_impl.adapter import FoldImplementation

class Trainer(FoldImplementation):
    name = "tinyfold"

    def gradients(self):
        found = dict(super().gradients())
        for name in found:
            if "experts" in name:
                found[name] = found[name] * {factor}
        return found
"""
CASE = (
    'suite = "tiny"\nimplementation = "tinyfold:Trainer"\n[[case]]\nshape = {world = 2, ep = 2}\n'
)


def wheel(folder: Path, name: str, version: str, module: str = "") -> None:
    """Write a package of one module, as an installer takes it."""
    about = f"{name}-{version}.dist-info"
    record = f"{name}.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n"
    files = {
        f"{name}.py": module,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": record,
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder that is all the installer can take packages from; work beside it."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def parity(*arguments: str) -> Result:
    """Run a command."""
    return CliRunner().invoke(cli.main, arguments)


# --- the whole way ------------------------------------------------------------------------------


def test_two_versions_that_differ_and_one_that_cannot_be_had(shelf: Path) -> None:
    """The fault is in 2.0 alone; what 3.0 costs is its own column; a second run finds all done."""
    for version, factor in (("1.0", 1.0), ("2.0", 2.0)):
        wheel(shelf, "tinyfold", version, TRAINER.format(factor=factor))
    Path("cases").mkdir()
    Path("cases/tiny.toml").write_text(CASE)
    asked = ["versions", "tinyfold==3.0", "tinyfold==2.0", "tinyfold==1.0", "--suite", "tiny",
             "--out", "out"]  # fmt: skip
    done = parity(*asked)
    assert done.exit_code == 3, done.output
    found = json.loads(Path("out/versions.json").read_text())
    assert [v["version"] for v in found["versions"]] == ["1.0", "2.0", "3.0"]
    assert [v["exit_code"] for v in found["versions"]] == [0, 1, 3]
    (cell,) = found["cells"]
    assert cell["verdicts"] == {"1.0": "pass", "2.0": "fail", "3.0": None}
    assert (cell["first_good"], cell["first_bad"], cell["changes"]) == ("1.0", "2.0", True)
    assert "expert gradient x2.000" in found["versions"][1]["reasons"][cell["case"]]
    assert "tinyfold==3.0 cannot be installed:" in found["versions"][2]["problem"]
    assert "No matching distribution found for tinyfold==3.0" in found["versions"][2]["problem"]
    run = json.loads(Path("out/tinyfold-2.0/run.json").read_text())
    assert run["executable"].startswith(str(Path("cache/foldparity/versions").resolve()))
    assert "pass w2" in " ".join(done.stderr.split())
    assert done.stdout == Path("out/versions.md").read_text()
    assert "| 1.0   | 2.0   | 3.0   | first good   | first bad   |" in done.stdout
    assert "- 2.0 fail: expert gradient x2.000" in done.stdout
    again = parity(*asked[:1], *asked[2:])
    assert again.exit_code == 1
    assert again.stderr == "table: out/versions.md\n"  # nothing installed, nothing run
    other = parity("versions", "tinyfold==1.0", "--select", "w2-*", "--out", "out")
    assert other.exit_code == 2
    assert "holds a run with suite = 'tiny', not None; give another --out" in other.stderr


# --- environments -------------------------------------------------------------------------------


def test_an_environment_is_made_once_and_again_if_it_was_cut_off(shelf: Path) -> None:
    """The interpreter sees the version in front, and this project and torch as they are here."""
    wheel(shelf, "tinyfold", "1.0")
    wanted, cache = Requirement("tinyfold==1.0"), Path("cache")
    made = prepare(wanted, cache, os.environ)
    mark = made.folder / "made.json"
    first = mark.stat().st_mtime_ns
    assert prepare(wanted, cache, os.environ) == made
    assert mark.stat().st_mtime_ns == first
    mark.unlink()
    (made.folder / "left").touch()
    prepare(wanted, cache, os.environ)
    assert mark.is_file()
    assert not (made.folder / "left").exists()
    assert made.variables({"A": "1"}) == {
        "A": "1", "TORCH_EXTENSIONS_DIR": str(made.folder / "torch_extensions"),
    }  # fmt: skip
    for name in ("tinyfold", "parity", "torch"):
        code = f"import importlib.util as i; print(i.find_spec({name!r}).origin)"
        where = subprocess.check_output([made.python, "-c", code], cwd="/", text=True)
        assert where.startswith(str(made.folder)) == (name == "tinyfold"), where


def test_a_version_that_only_runs_here_is_not_taken_for_an_installed_one(shelf: Path) -> None:
    """With an installer that does nothing, the running environment's own would be judged."""
    version = metadata.version("click")
    wheel(shelf, "click", version)
    wanted = Requirement(f"click=={version}")
    with pytest.raises(InstallationError, match=f"after its installation {version} is found in"):
        prepare(wanted, Path("cache"), {**os.environ, "PIP_DRY_RUN": "1"})
    assert not [*Path("cache").glob("*/made.json")]
    made = prepare(wanted, Path("cache"), os.environ)
    assert (made.folder / "made.json").is_file()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["deepspeed"], "'deepspeed' pins no version; allowed: package==version"),
        (["deepspeed>=0.19"], "'deepspeed>=0.19' pins no version"),
        (["deepspeed==0.19.*"], "'deepspeed==0.19.*' pins no version"),
        (["deepspeed==0.19,<1"], "pins no version"),
        (["==1"], "'==1' pins no version"),
        (["deepspeed==1", "torch==2"], "versions of deepspeed and torch; allowed: of one package"),
    ],
)
def test_what_pins_no_version_is_a_usage_error(texts: list[str], says: str) -> None:
    """Exit code 2, before anything is installed."""
    with pytest.raises(UsageError) as problem:
        versions_of(texts)
    assert says in str(problem.value)
    assert parity("versions", *texts).exit_code == 2


def test_versions_are_sorted_as_versions() -> None:
    """0.19.10 comes after 0.19.9, and one that is named twice is one."""
    texts = ["a==0.19.10", "a==0.19.9", "A==0.19.9", "a==0.20rc1"]
    assert [str(r.specifier) for r in versions_of(texts)] == ["==0.19.9", "==0.19.10", "==0.20rc1"]


# --- the table ----------------------------------------------------------------------------------


def column(version: str, verdicts: Mapping[str, str], **other: Any) -> Column:
    """Make a column of verdicts."""
    return Column(version, exit_code=0, verdicts=verdicts, **other)


COLUMNS = [
    column("1", {"same": "pass", "broke": "pass", "known": "fail"}, marks={"known": ("0042",)},
           reasons={"known": "expert gradient x2.000"}),
    column("2", {"same": "pass", "broke": "fail", "known": "fail", "late": "skipped"},
           reasons={"broke": "router update\ndiffers", "known": "differs", "late": "too old"}),
    Column("3", problem="pip: no such version"),
    column("4", {"same": "pass", "broke": "pass", "known": "error", "late": "pass"}),
]  # fmt: skip


def test_first_good_and_first_bad_versions() -> None:
    """Skipped and missing are neither; cells that change come first."""
    lines = {line.case: line for line in lines_of(COLUMNS)}
    assert [*lines] == ["broke", "known", "late", "same"]
    firsts = {case: (line.first_good, line.first_bad) for case, line in lines.items()}
    assert firsts == {"broke": ("1", "2"), "known": (None, "1"), "late": ("4", None),
                      "same": ("1", None)}  # fmt: skip
    assert lines["known"].texts == ("fail 0042", "fail", "-", "error")
    assert lines["late"].texts == ("-", "skipped", "-", "pass")


def test_one_reason_is_told_once_for_all_versions_and_cells() -> None:
    """Ranks and files, which differ from one environment to the next, are left out."""
    columns = [
        column(v, {"a": "error", "b": "error", "c": "skipped"}, reasons={
            "a": f"rank {v} raised TypeError: no  x at /env/{v}/f.py:3; folded away: rank 9",
            "b": "rank 0 raised TypeError: no x", "c": f"refused by {v}.",
        }) for v in ("1", "2", "3")
    ]  # fmt: skip
    text = versions.markdown(columns, "tinyfold", "parity versions")
    assert "\n- 1 to 3 error: TypeError: no x: `a`, `b`\n" in text
    assert "\n- 2 skipped: refused by 2: `c`\n" in text


def test_the_table_says_why() -> None:
    """What is new or skipped with its reason, what is known without, what has no verdict at all."""
    text = versions.markdown(COLUMNS, "tinyfold", "parity versions")
    assert "- 2 fail: router update differs: `broke`\n" in text
    assert "- 2 skipped: too old: `late`\n" in text
    assert "x2.000" not in text
    assert "tinyfold 3:\n\n```text\npip: no such version\n```" in text
    assert text.index("## Cells that differ") < text.index("`late`  ") < text.index("`same`")


@pytest.mark.parametrize(
    ("codes", "together"), [([0, 1, 3], 3), ([5, 1, 0], 1), ([5, 0], 0), ([5, 5], 5)]
)
def test_the_exit_code_of_all_versions(codes: list[int], together: int) -> None:
    """As for cases: infrastructure wins over failures, and nothing but skips is 5."""
    assert versions.exit_code([Column("1", exit_code=code) for code in codes]) == together


def test_a_run_of_something_else_is_not_taken(tmp_path: Path) -> None:
    """A folder with another selection is refused; one that was cut off is gone on with."""
    asked = Selection(suite="seed")
    path = directory(tmp_path / "a", passing(case_of(4)), state="interrupted")
    assert not versions.is_finished(path, asked)
    assert versions.is_finished(directory(tmp_path / "b", passing(case_of(4))), asked)
    assert not versions.is_finished(tmp_path / "none", asked)
    with pytest.raises(UsageError, match="holds a run with suite = 'seed', not 'default'"):
        versions.is_finished(path, Selection(suite="default"))


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first version's column stands in the table, the second one's says interrupted: 130."""
    monkeypatch.chdir(tmp_path)
    done_before = Selection(suite="seed", selectors=("w4-*",)).to_dict()
    for name in ("a-1", "a-2"):
        state = {"a-1": "finished", "a-2": "interrupted"}[name]
        directory(tmp_path / "out" / name, passing(case_of(4)), selection=done_before, state=state)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parity.cli_versions.prepare", interrupt)
    done = parity(
        "versions", "a==1", "a==2", "a==3", "--suite", "seed", "--select", "w4-*", "--out", "out"
    )
    assert done.exit_code == 130, done.output
    found = json.loads(Path("out/versions.json").read_text())
    assert [v["problem"] for v in found["versions"]] == [None, "interrupted"]
    assert found["cells"][0]["verdicts"] == {"1": "pass", "2": "pass"}
