"""What the fork server does to a library once, before it forks ranks that inherit it.

Owns the preparation of DeepSpeed and Megatron-Core. Must not know cases or implementations. Easy to
get wrong: this runs before any process group exists, so nothing here may ask for a rank.
"""

from __future__ import annotations

import logging

DEEPSPEED = (
    "deepspeed",
    "deepspeed.moe.layer",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "parity.warm:deepspeed",
)
"""What `GangPool` preloads besides torch where a case runs on DeepSpeed; the Muon module is one
that DeepSpeed imports, and compiles kernels of, inside its first reduction."""


DEEPSPEED_FOLDING = (
    "deepspeed.module_inject.auto_ep",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "parity.warm:hugging_face",
)
"""Preloaded, too, where DeepSpeed's own folding is judged."""


MEGATRON = ("parity.warm:megatron",)
"""Preloaded where Megatron-Core is judged."""


def deepspeed() -> None:
    """Keep DeepSpeed from compiling an operator in every gang's first case, and from chatting.

    On a CPU its communication backend builds `deepspeed_shm_comm` unless the operator counts as
    incompatible; an empty table also spares the search for a compiler.
    """
    import deepspeed.ops
    from deepspeed.utils import logger

    vars(deepspeed.ops)["__compatible_ops__"] = {}
    logger.setLevel(logging.ERROR)


def hugging_face() -> None:
    """Import the models that DeepSpeed's own folding is judged on, where transformers is there."""
    import contextlib
    import importlib

    with contextlib.suppress(ImportError):
        for name in ("mixtral", "qwen3_moe"):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def megatron() -> None:
    """Import what the adapter of Megatron-Core uses, where it is there."""
    import contextlib
    import importlib
    import warnings

    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages it would like to have
        for name in ("models.gpt", "optimizer", "pipeline_parallel.schedules"):
            importlib.import_module(f"megatron.core.{name}")
