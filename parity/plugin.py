"""pytest plugin: case files as test items, one per case, also under xdist.

Owns options, collection, and the way of rows to the one process that writes the run directory.
Must not import torch, nor do anything at all, where no case is asked for. Easy to get wrong: with
xdist this module runs in the controller and in every worker; only the controller writes, and only
workers have ranks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity.case import Case
    from parity.known import KnownFindings
    from parity.session import Finished, Judging, Recorder, Selection

_PAYLOAD = "parity_case"
"""Attribute of a test report: the rows of its case as JSON, on their way to the controller."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; without one of them, or a case file among the arguments, nothing runs."""
    group = parser.getgroup("parity", "gradient parity of folded MoE training")
    group.addoption("--parity-suite", metavar="NAME", help="collect the cases of this suite")
    group.addoption(
        "--parity-implementation", metavar="NAME|module:attr", help="what is judged: fold_impl"
    )
    group.addoption("--parity-device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda")
    group.addoption(
        "--parity-out", metavar="DIR", help="run directory: reports/<timestamp>-<commit>"
    )
    group.addoption(
        "--parity-fail-on", choices=("any", "new"), default="any",
        help="new: failures that are known findings are expected (xfail)",
    )  # fmt: skip
    group.addoption("--parity-known", metavar="FILE", help="list of known findings")
    parser.addini("parity_suite", "suite whose cases are always collected", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Start the plugin's state, and put the folder of cases among the paths if a suite is named."""
    config.addinivalue_line("markers", "parity: a case of gradient parity, made by its case file")
    plugin = ParityPlugin(config)
    if plugin.suite:
        plugin.collect_suite()
    if not hasattr(config, "workerinput"):
        plugin.check_options()
    config.pluginmanager.register(plugin, "parity-session")


class CaseFailed(Exception):  # noqa: N818 - the finding of a test, worded for its reader
    """A case did not pass; the text is all there is to show."""


class CaseFile(pytest.File):
    """One TOML file of cases."""

    plugin: ParityPlugin

    def collect(self) -> Iterable[pytest.Item]:
        """Make an item of every case, those that share ranks side by side."""
        from parity.case_files import load_file, run_order

        for case in run_order(load_file(self.path)):
            if self.plugin.suite in (None, case.suite):
                item: CaseItem = CaseItem.from_parent(self, name=case.id)
                item.case, item.plugin = case, self.plugin
                item.add_marker("parity")
                item.extra_keyword_matches |= {case.suite, case.engine.name, case.optimizer.name}
                yield item

    def repr_failure(  # type: ignore[override]  # as in pytest's own Collector, without a style
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> Any:
        """Show a refused file as its one message."""
        from parity.errors import ParityError

        if isinstance(excinfo.value, ParityError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class CaseItem(pytest.Item):
    """One case; it passes if every row of it passes."""

    plugin: ParityPlugin
    case: Case
    finished: Finished | None = None

    def runtest(self) -> None:
        """Judge the case.

        Raises:
            CaseFailed: a row is not a pass.
        """
        from parity.fingerprint import versions
        from parity.known import assess
        from parity.report import tables
        from parity.store import FAILING

        self.finished = self.plugin.judge(self.case)
        rows = self.finished.rows
        if self.finished.verdict == "skipped":
            pytest.skip("; ".join(dict.fromkeys(row.reason or "" for row in rows)))
        if self.finished.verdict in FAILING:
            listed = self.plugin.listed
            known = assess(rows, listed, versions(listed.packages))
            (failure,) = tables.failures(rows, self.plugin.selection.rerun, known=known)
            if failure.is_known and self.config.getoption("--parity-fail-on") == "new":
                pytest.xfail(f"known: {', '.join(failure.marks)}")
            raise CaseFailed(tables.block(failure))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show findings and usage errors alone, without the way through the harness."""
        from parity.errors import ParityError

        if isinstance(excinfo.value, CaseFailed | ParityError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Name the case in the report of pytest."""
        return self.path, 0, self.name


class ParityPlugin:
    """State of one pytest process: the judge where cases run, the record where they are written."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        option = config.getoption
        self.suite: str | None = option("--parity-suite") or config.getini("parity_suite") or None
        self._worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        self._folder: Path | None = None
        self._open = contextlib.ExitStack()
        self._judges: dict[str, Judging] = {}
        self._recorder: Recorder | None = None
        self._files: dict[str, str] = {}
        self._selectors: tuple[str, ...] = ()
        self._implementations: set[str] = set()
        self._largest_world = 0
        self._uses: set[str] = set()
        self._started = time.perf_counter()

    # collection

    def collect_suite(self) -> None:
        """Have the folder of cases collected besides whatever else was asked for."""
        from parity.case_files import find_folder
        from parity.errors import UsageError

        try:
            self._folder = find_folder().resolve()
        except UsageError as problem:
            raise pytest.UsageError(str(problem)) from None
        if not any(self._is_asked(path) for path in self._folder.glob("*.toml")):
            self.config.args.append(str(self._folder))

    def check_options(self) -> None:
        """Refuse what cannot work before anything is collected; without an option do nothing.

        Raises:
            pytest.UsageError: as one message.
        """
        option = self.config.getoption
        name, out = option("--parity-implementation"), option("--parity-out")
        if not (self.suite or name or out or option("--parity-known")):
            return
        from parity import registry
        from parity.errors import UsageError
        from parity.store import RunDirectory

        try:
            if self.suite:
                self._check_suite(self.suite)
            if name:
                registry.check(name)
            if out:
                RunDirectory.check_free(Path(out))
        except UsageError as problem:
            raise pytest.UsageError(str(problem)) from None
        if option("--parity-known"):
            _ = self.listed

    def _check_suite(self, name: str) -> None:
        from parity.case_files import is_case_file, parse_file
        from parity.errors import CaseError, UsageError

        assert self._folder is not None, "a suite has a folder"
        asked = (self._path_of(argument) for argument in self.config.args)
        files = [*self._folder.glob("*.toml"), *(p for p in asked if p.suffix == ".toml")]
        try:
            suites = {parse_file(path).suite for path in files if is_case_file(path)}
        except CaseError:  # a bad file is shown where it is collected
            return
        if name not in suites:
            raise UsageError(f"unknown suite {name!r}; allowed: {', '.join(sorted(suites))}")

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> CaseFile | None:
        """Collect a case file if its suite's folder, its own, or the file itself was asked for."""
        if file_path.suffix != ".toml":
            return None
        if not self._is_asked(file_path) and file_path.parent != self._folder:
            return None
        from parity.case_files import is_case_file

        if not is_case_file(file_path):
            return None
        file: CaseFile = CaseFile.from_parent(parent, path=file_path)
        file.plugin = self
        return file

    def _is_asked(self, path: Path) -> bool:
        """Say whether a file, or its folder named `cases`, is among the arguments."""
        given = {self._path_of(argument) for argument in self.config.args}
        return path in given or (path.parent.name == "cases" and path.parent in given)

    def _path_of(self, argument: str) -> Path:
        return (self.config.invocation_params.dir / argument.partition("::")[0]).resolve()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the largest world, which the ranks must have room for, and what they run."""
        cases = [item.case for item in session.items if isinstance(item, CaseItem)]
        if cases:
            from parity.session import processes_of, uses_of

            self._largest_world = max(map(processes_of, cases))
            self._uses = uses_of(cases)
        self._note(item.nodeid for item in session.items if isinstance(item, CaseItem))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Iterable[str]) -> None:
        """Note the cases that a worker has collected, in the controller."""
        self._note(name for name in ids if name.partition("::")[0].endswith(".toml"))

    def _note(self, nodes: Iterable[str]) -> None:
        """Note cases as `parity run` would be told of them, for whoever goes on with this run."""
        chosen: dict[str, None] = {}
        for node in nodes:
            file, _, case = node.partition("::")
            path = (self.config.rootpath / file).resolve()
            if path.parent != self._cases:
                here = Path.cwd()
                shown = path.relative_to(here) if path.is_relative_to(here) else path
                case = f"{shown}::{case}"
            chosen[case] = None
        self._selectors = tuple(chosen)

    # running

    @functools.cached_property
    def _cases(self) -> Path | None:
        """Find the folder in which `parity run` looks for an id."""
        from parity.case_files import find_folder
        from parity.errors import UsageError

        try:
            return find_folder().resolve()
        except UsageError:
            return None

    @functools.cached_property
    def listed(self) -> KnownFindings:
        """Read the known findings."""
        from parity.errors import ParityError
        from parity.known import load

        given = self.config.getoption("--parity-known")
        try:
            return load(Path(given) if given else None)
        except ParityError as problem:
            raise pytest.UsageError(str(problem)) from None

    @property
    def selection(self) -> Selection:
        """Say what is judged, for the record and for the commands that run a case again."""
        from parity.session import DEFAULT_IMPLEMENTATION, Selection

        option = self.config.getoption
        given = option("--parity-implementation")
        judged = " and ".join(sorted(self._implementations))
        return Selection(
            selectors=self._selectors,
            suite=self.suite,
            implementation=given or judged or DEFAULT_IMPLEMENTATION,
            device=option("--parity-device"),
            files=self._files,
            is_given=bool(given),
        )

    def implementation_of(self, case: Case) -> str:
        """Name what is judged with a case."""
        from parity import session

        asked: str | None = self.config.getoption("--parity-implementation")
        return asked or session.implementation_of([case])

    def judge(self, case: Case) -> Finished:
        """Judge one case with this process's own ranks, which start with the first case."""
        from parity import registry, session

        self._files |= session.outside_files([case])
        implementation = self.implementation_of(case)
        if implementation not in self._judges:
            registry.check(implementation)
            workers = int(self._worker["workercount"]) if self._worker else 1
            ranks = max(session.MAX_LIVE_RANKS // workers, self._largest_world)
            opened = session.open_judge(
                implementation,
                self.selection.device,
                case,
                max_live_ranks=ranks,
                uses=self._uses,
            )
            self._judges[implementation] = self._open.enter_context(opened)
        return session.judge_case(self._judges[implementation], case, implementation)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the rows of a case to its report."""
        report = yield
        if call.when == "call" and isinstance(item, CaseItem) and item.finished:
            finished = item.finished
            payload = {
                "case": finished.case, "seconds": finished.seconds,
                "rows": [row.to_dict() for row in finished.rows],
                "file": self._files.get(finished.case), "definition": finished.definition,
                "absent": finished.absent, "implementation": self.implementation_of(item.case),
            }  # fmt: skip
            report.__dict__[_PAYLOAD] = json.dumps(payload, allow_nan=False)
            skips = report.skipped and not hasattr(report, "wasxfail")
            if skips and call.excinfo is not None:  # its place is the case, not this file
                report.longrepr = (str(item.path), 1, f"Skipped: {call.excinfo.value}")
        return report

    # writing, in the controller only

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Put the rows of a finished case on disk."""
        text = getattr(report, _PAYLOAD, None)
        if text is None or self._worker is not None:
            return
        from parity.session import Finished
        from parity.store import Row

        payload = json.loads(text)
        rows = tuple(Row.from_dict(row) for row in payload["rows"])
        if payload["file"]:
            self._files[payload["case"]] = payload["file"]
        self._implementations.add(payload["implementation"])
        finished = Finished(
            payload["case"], rows, payload["seconds"], payload["definition"],
            tuple(payload["absent"]),
        )  # fmt: skip
        recorder = self._record()
        recorder.selection = self.selection
        recorder.add(finished)

    def _record(self) -> Recorder:
        """Open the run directory with the first finished case."""
        if self._recorder is None:
            from parity.errors import UsageError
            from parity.fingerprint import commit
            from parity.session import Recorder
            from parity.store import RunDirectory

            given = self.config.getoption("--parity-out")
            out, root = Path(given) if given else None, self.config.rootpath / "reports"
            try:
                directory = RunDirectory.create(out, root=root, commit=commit())
            except UsageError as problem:
                pytest.exit(str(problem), pytest.ExitCode.USAGE_ERROR)
            words = map(str, self.config.invocation_params.args)
            self._recorder = Recorder(
                directory, self.selection, " ".join(["pytest", *words]),
                started=self._started, is_default=not out, listed=self.listed,
            )  # fmt: skip
        return self._recorder

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """End this process's ranks; in the controller, write the report."""
        self._open.close()
        if self._recorder is not None:
            stopped = exitstatus == pytest.ExitCode.INTERRUPTED or session.shouldstop
            self._recorder.close("interrupted" if stopped else "finished")

    def pytest_unconfigure(self) -> None:
        """End ranks that a session left behind which did not finish."""
        self._open.close()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say in one sentence how the cases went, and where the report is."""
        if self._recorder is not None:
            from parity.report.tables import headline

            terminalreporter.section("parity")
            terminalreporter.write_line(headline(self._recorder.rows, self._recorder.known))
            folder = self._recorder.directory.path
            terminalreporter.write_line(f"report: {folder / 'report.md'}")
            terminalreporter.write_line(f"page: {folder / 'report.html'}")
