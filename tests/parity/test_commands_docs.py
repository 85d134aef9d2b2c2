"""Documentation: every command in it can be run, and the case reference is up to date."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from parity import cli
from parity.case_files import load_folder, select
from tests.parity.example_rows import FakeJudge, scaled

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def commands() -> Iterator[tuple[str, str]]:
    """Give page and line of every command in a block of shell."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                if line.strip():
                    yield page.name, line.strip()


def of(*programs: str) -> list[str]:
    """Give the commands that start with one of some programs, each once."""
    lines = dict.fromkeys(line for _, line in commands())
    return [line for line in lines if shlex.split(line)[0] in programs]


def test_nothing_is_overlooked() -> None:
    """A command of another program would be one that no test below looks at."""
    assert {shlex.split(line)[0] for _, line in commands()} == {
        "parity", "pytest", "pip", "eval", "torchrun",
    }  # fmt: skip


@pytest.mark.parametrize("line", of("parity", "torchrun"))
def test_parity_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, options and values exist, and selectors choose cases."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    words = words[words.index("parity") + 1 :]
    root = click.Context(cli.main, info_name="parity")
    command = cli.main.get_command(root, words[0])
    assert command is not None, words[0]
    context = command.make_context(words[0], words[1:], parent=root)
    selectors = context.params.get("selectors") or context.params.get("selector")
    if selectors or "suite" in context.params:
        chosen = [selectors] if isinstance(selectors, str) else list(selectors or ())
        assert select(chosen, suite=context.params.get("suite"))


@pytest.mark.parametrize("line", of("pytest"))
def test_pytest_commands_collect(line: str) -> None:
    """Each collects cases, in a process of its own."""
    words = [word for word in shlex.split(line)[1:] if word not in ("-n", "auto", "--lf")]
    cases = ["cases", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *cases], cwd=REPOSITORY, text=True,
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".toml::w" in done.stdout


def test_the_completion_script_is_one() -> None:
    """What the shell evaluates names the command and its variable."""
    assert of("eval") == ['eval "$(parity completion bash)"']
    for shell in ("bash", "zsh", "fish"):
        done = CliRunner().invoke(cli.main, ["completion", shell])
        assert done.exit_code == 0, done.output
        assert "_PARITY_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["run", "w4-tp2-ep4-gas2-aux-sgd"], "w4-tp2-ep4-gas2-aux-sgd-fp32"),
        (["run", "--suite", "se"], "seed"),
        (["comp"], "compare"),
        (["compare", "--fail"], "--fail-on-margin"),
    ],
)
def test_words_complete(words: list[str], offered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases, suites, commands and options are offered."""
    monkeypatch.chdir(REPOSITORY)
    given = {"_PARITY_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["parity", *words]),
             "COMP_CWORD": str(len(words))}  # fmt: skip
    done = CliRunner().invoke(cli.main, [], env=given, prog_name="parity")
    assert offered in re.split(r"[,\s]", done.stdout)


def test_completion_is_quiet_where_cases_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed case file is no noise at a prompt."""
    tmp_path.joinpath("cases").mkdir()
    tmp_path.joinpath("cases", "bad.toml").write_text('suite = "x"\n[base')
    monkeypatch.chdir(tmp_path)
    given = {"_PARITY_COMPLETE": "bash_complete", "COMP_WORDS": "parity run w", "COMP_CWORD": "2"}
    done = CliRunner().invoke(cli.main, [], env=given, prog_name="parity")
    assert done.stdout.strip() == ""
    assert "Traceback" not in done.output


def test_the_case_reference_is_up_to_date() -> None:
    """`parity schema --format md > docs/cases.md` would change nothing."""
    done = CliRunner().invoke(cli.main, ["schema", "--format", "md"])
    assert done.exit_code == 0, done.output
    assert (REPOSITORY / "docs" / "cases.md").read_text() == done.stdout


def test_the_example_of_the_case_reference_loads(tmp_path: Path) -> None:
    """The case file on that page is a case file, of three cases."""
    text = (REPOSITORY / "docs" / "cases.md").read_text()
    example = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example
    tmp_path.joinpath("example.toml").write_text(example[1])
    ids = [case.id for case in load_folder(tmp_path)]
    assert len(ids) == 5
    assert ids[-1] == "one-of-its-own"


def test_links_lead_somewhere() -> None:
    """A page that is named exists."""
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_quick_start_can_be_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, compare, report, resume and history follow one another as on the page."""
    monkeypatch.chdir(tmp_path)

    cases = "w4-tp2-ep4-gas2-*"

    def parity(*words: str, judge: FakeJudge | None = None) -> int:
        words = (*words, "--suite", "seed") if cases in words else words
        done = CliRunner().invoke(cli.main, words, obj=(judge or FakeJudge()).open)
        assert "Traceback" not in done.output
        return done.exit_code

    assert parity("run", cases, "--out", "reports/base") == 0
    judge = FakeJudge({"aux-sgd": scaled})
    assert parity("run", cases, "--out", "reports/head", "--quiet", judge=judge) == 1
    assert {path.name for path in Path("reports/head").iterdir()} == {
        "results.jsonl", "run.json", "report.md", "report.html", "junit.xml", "ctrf.json",
    }  # fmt: skip
    assert parity("compare", "reports/base", "reports/head") == 1
    assert parity("history", "reports") == 0
    assert parity("report", "reports/head") == 0
    assert parity("run", "--resume", "reports/base") == 0
    about = json.loads(Path("reports/base/run.json").read_text())
    assert len(about["definitions"]) == 4
    assert about["started"] < about["ended"]
