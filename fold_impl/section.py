"""Read one table of a config key by key, and say precisely what cannot be as it is.

Owns the wording of a refusal (key, value, what would do) and the question which keys DeepSpeed
knows, which it answers by asking the installed DeepSpeed, lazily. Must not know what any key
means. Easy to get wrong: a key nobody took is an unknown key, so every reader takes before
`close`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

REQUIRED = object()

DEEPSPEED_SECTIONS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
    "tensor_parallel": ("deepspeed.runtime.tensor_parallel.config", "TPTrainingConfig"),
    "expert_parallel": ("deepspeed.module_inject.auto_ep_config", "AutoEPConfig"),
}
"""Section -> where DeepSpeed declares its keys."""


def _listed(allowed: str | Sequence[object]) -> str:
    return allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))


class ConfigError(ValueError):
    """One key of the config cannot be as it is; raised on every rank alike.

    Args:
        problem: What is wrong.
        key: Dotted key of the config.
        value: What was given; None where the key is missing.
        allowed: What would do in its place; None where nothing of the kind would.
    """

    refusal = False

    def __init__(
        self,
        problem: str,
        key: str,
        value: object = None,
        allowed: str | Sequence[object] | None = None,
    ) -> None:
        super().__init__(problem, key, value, allowed)
        self.problem, self.key, self.value, self.allowed = problem, key, value, allowed

    def __str__(self) -> str:
        text = f"{self.key} = {self.value!r}: {self.problem}"
        return text if self.allowed is None else f"{text}; allowed: {_listed(self.allowed)}"


class Unsupported(ConfigError):  # noqa: N818 - a refusal, not a mistake in the config
    """A valid wish that folding does not fulfil yet."""

    refusal = True


class Check(NamedTuple):
    """Test of one value, and what to say would do."""

    accepts: Callable[[Any], bool]
    allowed: str | Sequence[object]


def _integer_from(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _number_from(least: float) -> Callable[[Any], bool]:
    # `least <= v < inf` is false for nan and for infinity
    return lambda v: (
        isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v < float("inf")
    )


def one_of(*choices: object) -> Check:
    """Accept these values only; True is not taken for 1."""
    kinds = {type(c) for c in choices}
    return Check(lambda v: type(v) in kinds and v in choices, choices)


def optional(check: Check) -> Check:
    """Accept null too."""
    return Check(lambda v: v is None or check.accepts(v), f"{_listed(check.allowed)} or null")


def _is_betas(value: Any) -> bool:
    number = _number_from(0.0)
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(number(b) and b < 1 for b in value)
    )


POSITIVE = Check(_integer_from(1), "a positive integer")
COEFFICIENT = Check(_number_from(0.0), "a finite number >= 0")
BOOLEAN = Check(lambda v: isinstance(v, bool), "true, false")
NAME = Check(lambda v: isinstance(v, str) and bool(v), "a name")
TABLE = Check(lambda v: isinstance(v, Mapping), "a table")
BETAS = Check(_is_betas, "two numbers, each >= 0 and < 1")


class Section:
    """Read one table key by key; what was never asked for is an unknown key."""

    def __init__(self, path: str, table: Mapping[str, Any]) -> None:
        self.path, self.table = path, table
        self.asked: list[str] = []
        for key in table:
            if not isinstance(key, str):
                raise ConfigError("a key is text", self.at(repr(key)), table[key], "a text as key")

    def at(self, key: str) -> str:
        """Give the dotted key."""
        return f"{self.path}.{key}" if self.path else key

    def take(self, key: str, check: Check, default: Any = REQUIRED) -> Any:
        """Give a checked value or the default.

        Raises:
            ConfigError: the value does not pass, or a required key is missing.
        """
        self.asked.append(key)
        if key not in self.table and default is not REQUIRED:
            return default
        value = self.table.get(key)
        if key not in self.table or not check.accepts(value):
            problem = "wrong value" if key in self.table else "missing"
            raise ConfigError(problem, self.at(key), value, check.allowed)
        return copy.deepcopy(value)

    def section(self, key: str) -> Section:
        """Give a nested table, empty where it is absent or null."""
        return Section(self.at(key), self.take(key, optional(TABLE), None) or {})

    def leftovers(self) -> list[str]:
        """List the keys nobody asked for."""
        return [key for key in self.table if key not in self.asked]

    def close(self) -> None:
        """Refuse leftovers: by name where DeepSpeed knows the key, else as unknown."""
        for key in self.leftovers():
            known = self.path in DEEPSPEED_SECTIONS and key in section_keys(self.path)
            if known:
                problem = "not supported by folding yet, leave it out"
                raise Unsupported(problem, self.at(key), self.table[key], self.asked)
            raise unknown_key(self.at(key), self.table[key], self.asked)


def unknown_key(key: str, value: object, allowed: Sequence[str]) -> ConfigError:
    """Make the refusal of a key that nobody reads, with the nearest one that somebody does."""
    close = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"unknown key{hint}", key, value, allowed)


def section_keys(section: str) -> set[str]:
    """Ask DeepSpeed which keys it reads in a section."""
    module, name = DEEPSPEED_SECTIONS[section]
    declared = getattr(importlib.import_module(module), name)
    fields = getattr(declared, "model_fields", None)
    if fields is None:
        return {key for key in declared.__dataclass_fields__ if not key.startswith("_")}
    return {*fields, *(f.alias for f in fields.values() if f.alias)}


class _Recorder(dict[str, Any]):
    """A config that notes every top-level key it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def deepspeed_keys() -> set[str]:
    """Ask the installed DeepSpeed which top-level keys it reads, letting it read an empty config.

    Its constants do not tell keys from values and its documentation lags; its own reader cannot.
    """
    reader = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig
    recorder = _Recorder()
    reader.__new__(reader)._initialize_params(recorder)
    return recorder.asked
