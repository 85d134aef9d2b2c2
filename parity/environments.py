"""One virtual environment for each version of a judged package, on top of the running one.

Owns making, checking and caching them. Must not know cases or runs. Easy to get wrong: what such an
environment does not hold itself comes from the running one, so the judged package is installed into
it even where the running one has that very version, and its operators are compiled apart.

A whole environment would hold torch once more: gigabytes and minutes a version. With the standard
`--system-site-packages` an environment sees the packages of the base interpreter, which are not
those of the virtual environment that runs here. So a `.pth` file adds the site directories of the
running environment behind its own: this project is there as it is installed here (editable or not),
torch is the very same files, and only what is installed in front differs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from parity.errors import InfrastructureError, UsageError

_LAYER = "_running_environment.pth"
_MADE = "made.json"
"""Written last: a folder without it was cut off."""
_LAST_LINES = 12
_INSTALL = ("-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet")
_WHERE = (
    "import sys; from importlib.metadata import distribution as d; "
    "it = d(sys.argv[1]); print(it.version); print(it.locate_file(''))"
)


class InstallationError(InfrastructureError):
    """A version could not be installed; the text is the installer's own last lines."""


def versions_of(texts: Sequence[str]) -> list[Requirement]:
    """Read `package==version` arguments: each once, the oldest first.

    Raises:
        UsageError: one is no pinned requirement, or they name different packages.
    """
    found: dict[Version, Requirement] = {}
    for text in texts:
        try:
            requirement = Requirement(text)
            found.setdefault(pinned(requirement), requirement)
        except (InvalidRequirement, InvalidVersion, ValueError):
            allowed = "package==version, such as deepspeed==0.19.8"
            raise UsageError(f"{text!r} pins no version; allowed: {allowed}") from None
    packages = sorted({canonicalize_name(r.name) for r in found.values()})
    if len(packages) > 1:
        raise UsageError(f"versions of {' and '.join(packages)}; allowed: of one package")
    return [found[version] for version in sorted(found)]


def pinned(requirement: Requirement) -> Version:
    """Give the one version a requirement allows.

    Raises:
        ValueError: it allows several.
    """
    (only,) = requirement.specifier
    if only.operator != "==":
        raise ValueError(str(requirement))
    return Version(only.version)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one version in front of what runs here."""

    folder: Path

    @property
    def python(self) -> Path:
        """Path of its interpreter."""
        return self.folder / "bin" / "python"

    def variables(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Give what its processes get: torch names compiled operators without their version."""
        return {**environ, "TORCH_EXTENSIONS_DIR": str(self.folder / "torch_extensions")}


def prepare(requirement: Requirement, cache: Path, environ: Mapping[str, str]) -> Environment:
    """Find the environment of a version in the cache, or make it there.

    Args:
        requirement: `package==version`.
        cache: folder of environments; each belongs to one state of the running environment.
        environ: variables the installer gets.

    Raises:
        InstallationError: the installer failed, or another version is in front.
        UsageError: the cache cannot be written.
    """
    others = _installed_here(requirement.name)
    state = json.dumps([sys.prefix, sys.version, others])
    name = f"{requirement.name}-{pinned(requirement)}"
    folder = cache / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:10]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(f"--cache {cache}: {problem.strerror}") from None
    with FileLock(f"{folder}.lock"):
        made = Environment(folder.resolve())
        if not (folder / _MADE).is_file():
            try:
                _make(made, requirement, others, environ)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return made


def _installed_here(judged: str) -> dict[str, str]:
    """Map every distribution of the running environment, but the judged one, to its version."""
    found = {canonicalize_name(d.name): d.version for d in metadata.distributions() if d.name}
    found.pop(canonicalize_name(judged), None)
    return dict(sorted(found.items()))


def _make(
    made: Environment, requirement: Requirement, others: Mapping[str, str],
    environ: Mapping[str, str],
) -> None:  # fmt: skip
    has_pip = "pip" in _installed_here(requirement.name)  # then the layer brings it along
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=not has_pip).create(made.folder)
    python = "python{}.{}".format(*sys.version_info)
    packages = made.folder / "lib" / python / "site-packages"
    layer = [path for path in (*site.getsitepackages(), *_user_site()) if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in layer]
    (packages / _LAYER).write_text("".join(lines), encoding="utf-8")
    constraints = made.folder / "constraints.txt"
    pins = [f"{name}=={version}\n" for name, version in others.items()]
    constraints.write_text("".join(pins), encoding="utf-8")
    wanted, variables = str(requirement), made.variables(environ)
    _run(made, [*_INSTALL, "--no-deps", "--ignore-installed", wanted], variables, wanted)
    _run(made, [*_INSTALL, "--constraint", str(constraints), wanted], variables, wanted)
    version, where = _run(made, ["-c", _WHERE, requirement.name], variables, wanted).splitlines()
    is_inside = Path(where).resolve().is_relative_to(made.folder)
    if Version(version) != pinned(requirement) or not is_inside:
        raise InstallationError(f"{wanted}: after its installation {version} is found in {where}")
    (made.folder / _MADE).write_text(json.dumps({"requirement": wanted}), encoding="utf-8")


def _user_site() -> list[str]:
    return [site.getusersitepackages()] if site.ENABLE_USER_SITE else []


def _run(made: Environment, words: Sequence[str], environ: Mapping[str, str], wanted: str) -> str:
    """Run the environment's interpreter; its output.

    Raises:
        InstallationError: it failed; the text ends with its last lines.
    """
    done = subprocess.run(
        [str(made.python), *words], env=dict(environ), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
        raise InstallationError(f"{wanted} cannot be installed:\n{last}")
    return done.stdout
