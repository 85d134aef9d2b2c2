"""What the fork server does to a library once, before it forks ranks that inherit it.

Owns what ranks of an implementation inherit, and the preparation of DeepSpeed and Megatron-Core.
Must not know cases. Easy to get wrong: this runs before any process group exists, so nothing here
may ask for a rank; and a package that is missing or broken must not keep cases from running that do
not need it: the ranks that do will say so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Collection

from parity import registry
from parity.gang import PRELOAD

COMMON = (*PRELOAD, "torch._dynamo", "parity.trial")
"""The first torch.optim.Optimizer of a process imports dynamo, 1.4 CPU seconds."""
MODELS = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
"""Models of Hugging Face that a case may name, by the names of their modules."""


def preload(implementation: str, uses: Collection[str] = ()) -> tuple[str, ...]:
    """Name what a `GangPool` preloads, in order.

    An implementation of other packages is left to the ranks: what its import starts, a thread say,
    would not survive the fork.

    Args:
        implementation: its name, as `parity.registry` has it.
        uses: names of the engines and models of the cases.
    """
    names = list(COMMON)
    if "deepspeed" in {implementation, *uses}:
        names.append("parity.warm:deepspeed")
    if {*uses} & {*MODELS}:
        names.append("parity.warm:hugging_face")
    if implementation in ("fold_impl", "deepspeed", "megatron_core"):
        names.append(f"parity.warm:{implementation}_adapter")
    return tuple(names)


def deepspeed() -> None:
    """Import DeepSpeed, if it is there; keep it from compiling in first cases and from chatting.

    The Muon module is one that it imports, and compiles kernels of, inside its first reduction. On
    a CPU its communication backend builds `deepspeed_shm_comm` unless the operator counts as
    incompatible; an empty table also spares the search for a compiler. ZeRO-3 counts devices for
    each bucket it reduces, and on a CPU that starts a process.
    """
    with contextlib.suppress(Exception):
        import deepspeed.ops
        from deepspeed.utils import logger

        _inherit(
            "deepspeed.moe.layer",
            "deepspeed.runtime.bf16_optimizer",
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "deepspeed.runtime.zero.stage_1_and_2",
            "deepspeed.module_inject.auto_ep_config",
        )
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        logger.setLevel(logging.ERROR)
        numa = importlib.import_module("deepspeed.utils.numa")
        vars(numa)["get_numa_cores"] = functools.cache(numa.get_numa_cores)
        numa.get_numa_cores()


def hugging_face() -> None:
    """Import the models of Hugging Face that a case may name."""
    _inherit(*(f"transformers.models.{name}.modeling_{name}" for name in MODELS))


def fold_impl_adapter() -> None:
    """Import our own folding."""
    _adapter("fold_impl")


def deepspeed_adapter() -> None:
    """Import the adapter of DeepSpeed's own folding and what that uses."""
    _adapter("deepspeed")
    _inherit("deepspeed.module_inject.auto_ep", "deepspeed.runtime.zero.stage3")


def megatron_core_adapter() -> None:
    """Import the adapter of Megatron-Core and what it uses."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages it would like to have
        _adapter("megatron_core")
        _inherit(
            "megatron.core.models.gpt",
            "megatron.core.optimizer",
            "megatron.core.pipeline_parallel.schedules",
        )


def _adapter(name: str) -> None:
    """Import what an implementation's name stands for, if that can be imported."""
    with contextlib.suppress(Exception, SystemExit):
        registry.load(name)


def _inherit(*names: str) -> None:
    """Import each module that is there in this version and can be imported."""
    for name in names:
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name)
