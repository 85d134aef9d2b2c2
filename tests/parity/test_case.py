"""Loading, expanding, naming and refusing cases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from parity.case import _TOKENS, _UNNAMED, DEFAULTS, Case, flatten, identify, make, nest
from parity.case_files import (
    file_schema,
    find_folder,
    is_case_file,
    load_file,
    load_folder,
    load_toml,
    run_order,
    select,
)
from parity.errors import CaseError, NothingSelectedError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = REPOSITORY / "cases" / "seed.toml"


def write(folder: Path, text: str, name: str = "one.toml") -> Path:
    """Write a file and give its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def one(tmp_path: Path, lines: str) -> Case:
    """Load a file of a single case on 8 ranks."""
    text = f'suite = "s"\n[base]\nshape.world = 8\n[[case]]\n{lines}\n'
    (case,) = load_file(write(tmp_path, text))
    return case


# --- the suite seed -----------------------------------------------------------------------------


def test_seed_has_the_promised_cells() -> None:
    """The suite holds 8 shapes, each with SGD and Adam, gas 1 and 2, clip off and on."""
    cases = load_file(SEED)
    shapes = {(c.shape.world, c.shape.tp, c.shape.ep) for c in cases}
    assert shapes == {
        (4, 2, 4), (4, 4, 4), (8, 2, 4), (8, 4, 4), (6, 2, 3), (6, 3, 2), (6, 2, 2), (8, 4, 2),
    }  # fmt: skip
    cells = {
        (c.shape.world, c.shape.tp, c.shape.ep, c.optimizer.name, c.engine.gas, c.engine.clip)
        for c in cases
    }
    assert len(cases) == len(cells) == 64
    assert {cell[3:] for cell in cells} == {
        (o, g, c) for o in ("sgd", "adam") for g in (1, 2) for c in (0.0, 0.5)
    }


def test_seed_varies_what_hides_faults() -> None:
    """Float32 on Gloo, uneven tokens, an idle expert everywhere; the rest in some cases."""
    cases = load_file(SEED)
    assert {(c.engine.dtype, c.engine.backend) for c in cases} == {("float32", "gloo")}
    assert all(c.data.uneven and c.data.idle_expert for c in cases)
    assert all(c.steps == (2 if c.engine.gas == 1 else 1) for c in cases)
    assert sum(c.auxiliary.load_balance == 0.02 for c in cases) == 16
    assert sum(c.auxiliary.z_loss == 1e-3 for c in cases) == 8
    assert sum(c.data.lane_varying for c in cases) == 16


def test_seed_derives_data_parallel_sizes() -> None:
    """World 8 tp4/ep2 has dp 2, and edp 4 across lanes."""
    (case,) = select(["w8-tp4-ep2-steps2-sgd-fp32"], folder=SEED.parent)
    assert (case.layout.dp, case.layout.edp) == (2, 4)


# --- expansion ----------------------------------------------------------------------------------


def test_three_ways_to_write_a_key_are_one() -> None:
    """Nested, bare dotted and quoted dotted keys give the same flat form."""
    spellings = ("[model]\ntop_k = 1", "model.top_k = 1", '"model.top_k" = 1')
    assert [flatten(load_toml(text)) for text in spellings] == [{"model.top_k": 1}] * 3
    assert nest({"model.top_k": 1, "steps": 2}) == {"model": {"top_k": 1}, "steps": 2}


def test_axes_multiply_and_overrides_apply_in_order(tmp_path: Path) -> None:
    """A matrix is the product of its axes, changed by overrides, less the exclusions."""
    path = write(tmp_path, """
        suite = "s"
        [axes]
        shape = [{ world = 2 }, { world = 4, tp = 2 }]
        variant = [{ engine.gas = 1 }, { "engine.gas" = 3, model.top_k = 1 }]
        optimizer.name = ["sgd", "adam"]
        [[override]]
        when = { engine.gas = 3 }
        set = { steps = 2 }
        [[override]]
        when = { engine.gas = 3, shape.tp = [1] }
        set = { steps = 3 }
        [[exclude]]
        when = { shape.world = 4, optimizer.name = "adam" }
        """)  # fmt: skip
    assert [case.id for case in load_file(path)] == [
        "w2-sgd-fp32",
        "w2-adam-fp32",
        "w2-gas3-k1-steps3-sgd-fp32",
        "w2-gas3-k1-steps3-adam-fp32",
        "w4-tp2-sgd-fp32",
        "w4-tp2-gas3-k1-steps2-sgd-fp32",
    ]


def test_single_cases_stand_on_base_and_may_name_themselves(tmp_path: Path) -> None:
    """A [[case]] takes [base], its own fields, and an id of its own."""
    case = one(tmp_path, 'id = "my-case"\nmodel.layers = 3')
    assert (case.id, case.shape.world, case.model.layers) == ("my-case", 8, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('suite = "s"', "no case"),
        ('suite = "s"\n[base]\nshape.world = 1', "no case"),
        ('suite = "s"\n[axes]\nsteps = []', "at least one entry"),
        ('suite = "s"\n[axes]\nsteps = 1', "at least one entry"),
        ('suite = "s"\ncases = 1', "allowed: suite, description, implementation, base, axes"),
        ('suite = "two words"', "suite"),
        ("description = 'x'", "suite: required key is missing"),
        ('suite = "s"\n[[override]]\nwhen = {}\nset = {}', "no matrix"),
        ('suite = "s"\n[[exclude]]\nwen = {}', "allowed: when"),
        (
            'suite = "s"\n[axes]\nsteps = [1]\n[[exclude]]\nwhen = { step = 1 }',
            "exclude[0].when.st",
        ),
        ('suite = "s"\n[axes]\nsteps = [1]\n[[exclude]]\nwhen = { steps = 2 }', "matches no case"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nid = "a*"', "not an id"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nid = 3', "not an id"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nid = true', "not an id"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nid = "a.toml"', "which means a file"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nid = "a.toml.b"', "which means a file"),
        ('suite = "s"\nsample = "pairwise"\ncells = "5"', "cells: value not allowed"),
        ('suite = "s"\nsample = "pairwise"\ncells = true', "cells: value not allowed"),
        ('suite = "s"\n[[case]]\nshape.world = 1\nsuite = "t"', "cannot be set here"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    """A mistake in the file's own structure names the file and the key."""
    with pytest.raises(CaseError) as refusal:
        load_file(write(tmp_path, text))
    assert says in str(refusal.value)
    assert str(tmp_path / "one.toml") in str(refusal.value)


@pytest.mark.parametrize("text", [b'suite = "s', b'suite = "s"\n[base', b'suite = "\xff"'])
def test_malformed_toml_is_refused(tmp_path: Path, text: bytes) -> None:
    """Malformed TOML and bytes that are no text are one message with the file."""
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    with pytest.raises(CaseError, match=r"bad\.toml: malformed TOML"):
        load_file(path)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A path that is no file says so."""
    with pytest.raises(CaseError, match="cannot be read"):
        load_file(tmp_path / "absent.toml")


# --- refusals of a case -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "key", "value", "allowed"),
    [
        ("shape.ep = 3", "shape.ep", "3", "1, 2, 4"),
        ("shape.tp = 3", "shape.tp", "3", "1, 2, 4"),
        ("shape.tp = 0", "shape.tp", "0", "greater than or equal to 1"),
        ("shape.tp = true", "shape.tp", "True", "a valid integer"),
        ('shape.tp = "2"', "shape.tp", "'2'", "a valid integer"),
        ("shape = 8", "shape", "8", "a table"),
        ("shape.pp = 2", "shape.pp", "2", "1"),
        ("shape.ep = 8", "shape.ep", "8", "1, 2, 4"),
        ("shape.ep = 4\nshape.etp = 4", "shape.ep", "4", "1, 2"),
        ("shape.etp = 8", "shape.etp", "8", "1, 2, 4"),
        ("shape.tp = 8", "shape.tp", "8", "1, 2, 4"),
        ("shape.tp = 4\nmodel.mlp_width = 50", "shape.tp", "4", "1, 2"),
        ("shape.tp = 4\nmodel.shared_width = 6", "shape.tp", "4", "1, 2"),
        ("model.experts = 6\nshape.ep = 4", "shape.ep", "4", "1, 2"),
        ("model.hidden = 50", "model.heads", "12", "1, 2, 5, 10, 25, 50"),
        ("model.hidden = 24", "model.hidden", "24", "greater than or equal to 48"),
        ("model.top_k = 12", "model.top_k", "12", "1 to 11"),
        ("model.top_k = 13\ndata.idle_expert = false", "model.top_k", "13", "1 to 12"),
        ('model.name = "gpt"', "model.name", "'gpt'", "'tiny'"),
        ('optimizer.name = "adma"', "optimizer.name", "'adma'", "'sgd', 'momentum', 'adam'"),
        ('optimizer.lr = "1e-3"', "optimizer.lr", "'1e-3'", "a valid number"),
        ("optimizer.lr = nan", "optimizer.lr", "nan", "a finite number"),
        ("optimizer.betas = [0.9, 1.0]", "optimizer.betas", "1.0", "0 <= beta < 1"),
        ("engine.sequence_parallel_size = 2\nshape.tp = 2", "engine.sequence_parallel_size", "2",
         "1"),
        ("engine.zero = 1", "engine.zero", "1", "leave the key out"),
        ('engine = { name = "deepspeed", backend = "threads" }', "engine.backend", "'threads'",
         "gloo, nccl"),
        ('engine = { name = "deepspeed", dtype = "float64" }', "engine.dtype", "'float64'",
         "float32, bfloat16, float16"),
        ("model.vocab = 1", "model.vocab", "1", "greater than or equal to 2"),
        ("model.layers = 1", "model.layers", "1", "2 or more"),
        ("deadline_s = 1e300", "deadline_s", "1e+300", "less than or equal to 86400"),
        ("seed = 100000000000000000000000", "seed", "100000000000000000000000",
         "less than or equal to 1000000000"),
        ("seed = -1", "seed", "-1", "greater than or equal to 0"),
        ("optimizer.lr = 1e300", "optimizer.lr", "1e+300", "less than or equal to 1000"),
        ("optimizer.lr = 1e-300", "optimizer.lr", "1e-300", "greater than or equal to 0.0000"),
        ("optimizer.eps = 1e300", "optimizer.eps", "1e+300", "less than or equal to 1000"),
        ("optimizer.weight_decay = 1e300", "optimizer.weight_decay", "1e+300",
         "less than or equal to 1000"),
        ("optimizer.momentum = -1.0", "optimizer.momentum", "-1.0",
         "greater than or equal to 0"),
        ("optimizer.momentum = 1.0", "optimizer.momentum", "1.0", "less than 1"),
        ("auxiliary.z_loss = 1e300", "auxiliary.z_loss", "1e+300", "less than or equal to 1000"),
        ("engine.clip = 1e-300", "engine.clip", "1e-300", "0 (off), 1e-30 and more"),
        ('steps = 2\ncheckpoint = "reshard:w999999999"', "checkpoint", "'reshard:w999999999'",
         "a world of 1 to 4096"),
        ("engine.options.gradient_clipping = 0.5", "engine.options.gradient_clipping", "0.5",
         "set engine.clip"),
        ("engine.options.tensor_parallel.autotp_size = 4",
         "engine.options.tensor_parallel.autotp_size", "4", "set shape.tp"),
        ("engine.options.optimizer.params.lr = 1.0", "engine.options.optimizer.params.lr", "1.0",
         "set optimizer"),
        ("engine.options.tensor_parallel = 4", "engine.options.tensor_parallel", "4",
         "set shape.tp"),
        ("engine.options.zero_optimization.stage = 1", "engine.options.zero_optimization.stage",
         "1", "set engine.zero"),
        ('engine.options.folding.correction_bias_rate = "x"',
         "engine.options.folding.correction_bias_rate", "'x'", "0 to 1000"),
        ("model.layer = 2", "model.layer", "2", "name, layers, hidden"),
        ("modle.layers = 2", "modle", "{'layers': 2}", "shape, model, engine"),
        ("step = 2", "step", "2", "steps, seed, deadline_s"),
    ],
)  # fmt: skip
def test_a_bad_case_is_refused_with_everything_one_needs(
    tmp_path: Path, lines: str, key: str, value: str, allowed: str
) -> None:
    """The one message names file, case, key, value and what would do."""
    with pytest.raises(CaseError) as refusal:
        one(tmp_path, lines)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'one.toml'}: case w8")
    assert f": {key}: " in message
    assert f"(got {value}); allowed: " in message
    assert allowed in message.rpartition("allowed: ")[2]


@pytest.mark.parametrize(
    "lines",
    [
        "shape.ep = 4\nshape.tp = 2",
        "shape.tp = 4\nshape.etp = 4\nshape.ep = 2",
        "model.top_k = 11",
        "engine.sequence_parallel_size = 2",
        'engine = { name = "deepspeed", zero = 0 }',
        'engine = { dtype = "float64", backend = "threads" }',
        "optimizer.lr = 1",
        "optimizer.betas = [0.0, 0.5]",
        "optimizer.momentum = 0.0",
        "model.vocab = 2",
        "deadline_s = 86400.0",
        "seed = 1000000000",
        "engine.clip = 1e-3",
        'shape.tp = 2\nsteps = 2\ncheckpoint = "reshard:w4096"',
        "engine.options.tensor_parallel.tp_overlap_comm = true",
        "engine.options.zero_optimization.reduce_bucket_size = 5",
        "engine.options.gradient_clip = 0.5",
    ],
)
def test_near_misses_are_accepted(tmp_path: Path, lines: str) -> None:
    """What lies next to a refusal is a good case."""
    assert one(tmp_path, lines).shape.world == 8


@pytest.mark.parametrize(("world", "refused"), [("4097", True), ("4096", False)])
def test_a_world_has_a_bound(tmp_path: Path, world: str, refused: bool) -> None:
    """Beyond it sizes that divide the world would be counted for minutes."""
    path = write(tmp_path, f'suite = "s"\n[[case]]\nshape.world = {world}')
    if not refused:
        assert load_file(path)[0].shape.world == 4096
        return
    with pytest.raises(
        CaseError, match=r"shape\.world: .*4097.*allowed: less than or equal to 4096"
    ):
        load_file(path)


def test_a_missing_world_is_refused(tmp_path: Path) -> None:
    """The one required size is asked for by name."""
    path = write(tmp_path, 'suite = "s"\n[[case]]\nsteps = 2')
    with pytest.raises(CaseError, match=r"case w\?-steps2-sgd-fp32: shape\.world: required key"):
        load_file(path)


# --- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "w8-sgd-fp32"),
        ({"shape.tp": 2, "shape.ep": 4}, "w8-tp2-ep4-sgd-fp32"),
        ({"shape.tp": 2, "shape.ep": 2, "shape.etp": 2}, "w8-tp2-ep2-etp2-sgd-fp32"),
        ({"engine.name": "deepspeed"}, "w8-ds-sgd-fp32"),
        ({"engine.name": "deepspeed", "engine.zero": 2}, "w8-z2-sgd-fp32"),
        ({"engine.backend": "nccl", "engine.dtype": "bfloat16"}, "w8-nccl-sgd-bf16"),
        ({"engine.gas": 2, "engine.clip": 0.5}, "w8-gas2-clip-sgd-fp32"),
        ({"engine.clip": 0.25}, "w8-clip0.25-sgd-fp32"),
        ({"auxiliary.load_balance": 0.02, "auxiliary.z_loss": 1e-3}, "w8-aux-zloss-sgd-fp32"),
        ({"auxiliary.load_balance": 0.02, "auxiliary.scope": "global"}, "w8-auxg-sgd-fp32"),
        ({"auxiliary.load_balance": 0.1}, "w8-aux0.1-sgd-fp32"),
        ({"data.lane_varying": True, "data.uneven": False}, "w8-lanes-even-sgd-fp32"),
        ({"model.top_k": 1, "model.score": "sigmoid"}, "w8-k1-sigmoid-sgd-fp32"),
        ({"model.shared_width": 24, "model.biases": True}, "w8-shared-bias-sgd-fp32"),
        ({"model.tied": True, "model.layers": 3, "steps": 3}, "w8-tied-L3-steps3-sgd-fp32"),
        ({"optimizer.name": "adam", "optimizer.lr": 0.1, "engine.dtype": "float64"},
         "w8-lr0.1-adam-fp64"),
    ],
)  # fmt: skip
def test_ids_say_what_differs(fields: dict[str, Any], expected: str) -> None:
    """An id holds the shape, what differs from the defaults, then optimizer and dtype."""
    assert identify({"shape.world": 8, **fields}) == expected


def test_every_field_that_is_computed_with_shows_in_the_id() -> None:
    """Two cases that differ in any field but seed and deadline have two ids."""
    silent = {"seed", "deadline_s", "auxiliary.scope", "engine.options"}
    known = {token.key for token in _TOKENS} | set(_UNNAMED)
    assert known - set(DEFAULTS) == set()
    for key, default in DEFAULTS.items():
        other = "zzz" if isinstance(default, str) else 7
        changed = not default if isinstance(default, bool) else other
        base = {"shape.world": 8}
        is_told = identify({**base, key: changed}) != identify({**base, key: default})
        assert is_told is (key not in silent), key


def test_engine_options_show_as_a_stable_fingerprint() -> None:
    """Sections handed to the engine tell two cases apart without being spelt out."""
    ids = [identify({"shape.world": 2, "engine.options.zero.bucket": n}) for n in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_one_id_twice_in_a_suite_is_refused(tmp_path: Path) -> None:
    """The seed is no axis: two cases that differ in it alone have one id."""
    path = write(tmp_path, 'suite = "s"\n[base]\nshape.world = 2\n[axes]\nseed = [0, 1]')
    with pytest.raises(CaseError, match=r"case w2-sgd-fp32: id: the id is taken"):
        load_file(path)


def test_one_cell_in_two_suites_is_one_case(tmp_path: Path) -> None:
    """The same cell may stand in two suites; another cell may not take its id."""
    single = '\n[[case]]\nid = "a"\nshape.world = 2\n'
    write(tmp_path, f'suite = "s"{single}', "one.toml")
    write(tmp_path, f'suite = "t"{single}deadline_s = 5.0', "two.toml")
    assert len(load_folder(tmp_path)) == 2
    assert len(select(["a"], folder=tmp_path)) == 1
    write(tmp_path, f'suite = "t"{single}steps = 2', "two.toml")
    with pytest.raises(CaseError, match="the id is taken by another case of"):
        load_folder(tmp_path)


# --- selection ----------------------------------------------------------------------------------


def test_selectors_are_ids_globs_and_files(tmp_path: Path) -> None:
    """Ids and globs search the folder; a file, with or without a glob, is read itself."""
    folder = tmp_path / "cases"
    folder.mkdir()
    write(folder, 'suite = "s"\n[axes]\nshape.world = [1, 2, 4]')
    other = write(tmp_path, 'suite = "o"\n[axes]\nshape.world = [3, 5]', "other.toml")

    def ids(*selectors: str, suite: str | None = None) -> list[str]:
        return [case.id for case in select(selectors, suite=suite, folder=folder)]

    assert ids("w2-sgd-fp32") == ["w2-sgd-fp32"]
    assert ids("w[12]-*", "w1-*") == ["w1-sgd-fp32", "w2-sgd-fp32"]
    assert ids(str(other)) == ["w3-sgd-fp32", "w5-sgd-fp32"]
    assert ids(f"{other}::w5*") == ["w5-sgd-fp32"]
    assert ids(suite="s") == ["w1-sgd-fp32", "w2-sgd-fp32", "w4-sgd-fp32"]
    with pytest.raises(UsageError, match=r"unknown suite 'x'; allowed: s"):
        ids(suite="x")
    with pytest.raises(NothingSelectedError, match=r"did you mean w2-sgd-fp32"):
        ids("w2-sdg-fp32")


def test_the_folder_of_cases_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./cases comes first, if it holds case files; else the one of the package."""
    monkeypatch.chdir(tmp_path)
    assert find_folder() == SEED.parent
    (tmp_path / "cases").mkdir()
    write(tmp_path / "cases", "key = 1")
    assert find_folder() == SEED.parent
    write(tmp_path / "cases", 'suite = "s"')
    assert find_folder() == Path("cases")
    with pytest.raises(UsageError, match="no such folder"):
        find_folder(tmp_path / "absent")


def test_a_case_file_is_known_by_its_suite(tmp_path: Path) -> None:
    """A file that names a suite is one, well formed or not; another TOML file is none."""
    assert is_case_file(write(tmp_path, 'suite = "s"\n[base'))
    assert is_case_file(write(tmp_path, "[[case]]\nshape.world = 1"))
    assert is_case_file(write(tmp_path, "suit = 's'\n[ axes ]\nsteps = [1]"))
    assert not is_case_file(write(tmp_path, "[tool.other]\nkey = 1"))
    assert not is_case_file(write(tmp_path, "[cases]\nsuites = 1\naxes = 2"))
    assert not is_case_file(tmp_path / "absent.toml")
    tmp_path.joinpath("folder.toml").mkdir()
    assert not is_case_file(tmp_path / "folder.toml")


def test_a_folder_may_hold_other_toml_files(tmp_path: Path) -> None:
    """A linter's config beside the cases is none; a broken case file still stops the loading."""
    write(tmp_path, 'suite = "s"\n[[case]]\nshape.world = 1')
    write(tmp_path, 'line-length = 100\nexclude = ["x"]\n[lint]\nselect = ["E"]', "ruff.toml")
    assert [case.id for case in load_folder(tmp_path)] == ["w1-sgd-fp32"]
    for broken in (b'suite = "t"\n[base', b'suite = "\xff"', b"[[case]]\nshape.world = 1"):
        tmp_path.joinpath("two.toml").write_bytes(broken)
        with pytest.raises(CaseError, match=r"two\.toml"):
            load_folder(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cases would be missed without a word."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, 'suite = "s"')
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CaseError, match="cannot be read: Permission denied"):
        load_folder(tmp_path)


def test_cases_of_one_gang_run_in_a_row() -> None:
    """In run order every shape, and within it every data and model, comes once."""
    cases = run_order(load_file(SEED))
    shapes = [case.shape.model_dump_json() for case in cases]
    assert len({*shapes}) == sum(a != b for a, b in zip(["", *shapes], shapes, strict=False))
    assert [case.shape.world for case in cases] == sorted(case.shape.world for case in cases)


# --- schema and imports -------------------------------------------------------------------------


def test_the_schema_describes_case_files() -> None:
    """The JSON schema takes the shipped suite and refuses an unknown key or value."""
    schema = file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    shipped = load_toml(SEED.read_text(encoding="utf-8"))
    assert list(validator.iter_errors(shipped)) == []
    json.dumps(schema)
    bad_cases: tuple[Any, ...] = (
        {"modle": {}}, {"model": {"name": "gpt"}}, {"model.top_k": 0}, {"model.layers": 1},
        {"model": {"layers": 1}}, {"id": 3}, {"id": "a.toml"},
    )  # fmt: skip
    for bad in bad_cases:
        assert list(validator.iter_errors({"suite": "s", "case": [bad]}))


def test_reading_cases_imports_neither_torch_nor_pandas() -> None:
    """Cases are read, and refused, before anything heavy is imported."""
    code = (
        "import sys, parity.case, parity.cli; print({'torch', 'pandas', 'rich'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_make_refuses_fields_that_follow_from_the_file() -> None:
    """Suite and file are known already and cannot be set by a case."""
    with pytest.raises(CaseError, match="cannot be set here"):
        make({"shape.world": 1, "file": "x"}, suite="s", file="f.toml")


def test_a_file_names_what_its_cases_are_about(tmp_path: Path) -> None:
    """Every case of the file knows it; it is no part of the id, and no case may set it."""
    text = 'suite = "s"\nimplementation = "x"\n[axes]\nshape = [{ world = 2, tp = 2 }]\n'
    (one,) = load_file(write(tmp_path, text))
    assert (one.implementation, one.id) == ("x", "w2-tp2-sgd-fp32")
    with pytest.raises(CaseError, match="cannot be set here"):
        make({"shape.world": 1, "implementation": "x"}, suite="s", file="f.toml")


def test_ids_spell_out_known_options_and_hash_the_rest() -> None:
    """The usual value shows as the bare word; what has no word of its own shares one hash."""
    zero = "engine.options.zero_optimization."
    known = {f"{zero}overlap_comm": True, f"{zero}reduce_bucket_size": 500,
             "engine.options.data_types.grad_accum_dtype": "fp32"}  # fmt: skip
    assert identify({"shape.world": 2, **known}) == "w2-overlap-bucket500-acc_fp32-sgd-fp32"
    other = identify({"shape.world": 2, **known, "engine.options.x": 1})
    assert re.fullmatch("w2-overlap-bucket500-acc_fp32-options[0-9a-f]{6}-sgd-fp32", other)
    assert other != identify({"shape.world": 2, **known, "engine.options.x": 2})


# --- pairwise samples ---------------------------------------------------------------------------


def test_a_pairwise_sample_holds_every_pair_that_is_not_excluded(tmp_path: Path) -> None:
    """Of 27 cells 9 hold all 27 pairs; the excluded pair is avoided, not filtered away."""
    text = """
        suite = "s"
        sample = "pairwise"
        [base]
        shape.world = 4
        [axes]
        engine.gas = [1, 2, 3]
        model.top_k = [1, 2, 4]
        steps = [1, 2, 3]
        [[exclude]]
        when = { engine.gas = 3, steps = 3 }
        """
    cells = {(c.engine.gas, c.model.top_k, c.steps) for c in load_file(write(tmp_path, text))}
    assert len({(gas, k) for gas, k, _ in cells}) == len({(k, t) for _, k, t in cells}) == 9
    assert {(gas, t) for gas, _, t in cells} == {
        (g, t) for g in (1, 2, 3) for t in (1, 2, 3) if (g, t) != (3, 3)
    }
    assert len(cells) < 27


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("cells = 5", "cells: the product has as many cells as it has"),
        ('sample = "pairwise"', "axes: has no pairs"),
        ('sample = "triples"', "'product' or 'pairwise'"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(tmp_path: Path, lines: str, says: str) -> None:
    """A minimum without a sample, a sample of one axis, an unknown way to sample."""
    text = f'suite = "s"\n{lines}\n[axes]\nshape.world = [2, 4]\n'
    with pytest.raises(CaseError, match=says):
        load_file(write(tmp_path, text))
