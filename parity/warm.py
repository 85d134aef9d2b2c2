"""What the fork server does to a library once, before it forks ranks that inherit it.

Owns the preparation of DeepSpeed and Megatron-Core. Must not know cases or implementations. Easy to
get wrong: this runs before any process group exists, so nothing here may ask for a rank; and a
package that is missing must not keep cases from running that do not need it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging

DEEPSPEED = ("parity.warm:deepspeed",)
"""What `GangPool` preloads besides torch where a case runs on DeepSpeed."""


DEEPSPEED_FOLDING = ("parity.warm:deepspeed_folding", "parity.warm:hugging_face")
"""Preloaded, too, where DeepSpeed's own folding is judged."""


MEGATRON = ("parity.warm:megatron",)
"""Preloaded where Megatron-Core is judged."""


def deepspeed() -> None:
    """Import DeepSpeed, if it is there; keep it from compiling in first cases and from chatting.

    The Muon module is one that it imports, and compiles kernels of, inside its first reduction. On
    a CPU its communication backend builds `deepspeed_shm_comm` unless the operator counts as
    incompatible; an empty table also spares the search for a compiler.
    """
    names = ("moe.layer", "runtime.bf16_optimizer", "runtime.zero.muon.muon_optimizer")
    with contextlib.suppress(ImportError):
        import deepspeed.ops
        from deepspeed.utils import logger

        for name in names:  # not every version has all of them
            with contextlib.suppress(ImportError):
                importlib.import_module(f"deepspeed.{name}")
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        logger.setLevel(logging.ERROR)


def deepspeed_folding() -> None:
    """Import what DeepSpeed's own folding uses, where it is there."""
    with contextlib.suppress(ImportError):
        for name in ("module_inject.auto_ep", "runtime.zero.stage_1_and_2", "runtime.zero.stage3"):
            importlib.import_module(f"deepspeed.{name}")


def hugging_face() -> None:
    """Import the models that DeepSpeed's own folding is judged on, where transformers is there."""
    with contextlib.suppress(ImportError):
        for name in ("mixtral", "qwen3_moe"):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def megatron() -> None:
    """Import what the adapter of Megatron-Core uses, where it is there."""
    import warnings

    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages it would like to have
        for name in ("models.gpt", "optimizer", "pipeline_parallel.schedules"):
            importlib.import_module(f"megatron.core.{name}")
