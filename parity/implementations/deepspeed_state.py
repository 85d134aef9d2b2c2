"""What DeepSpeed keeps in its modules, made fit for case after case in one warm rank.

Owns what is set once per rank and what is forgotten before each engine. Must not know cases, models
or gradients. Easy to get wrong: `deepspeed.utils.groups` serves the groups of the *first* shape for
ever unless it is told to forget them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from parity.implementation import RankContext

_TABLES = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    "_ALL_TO_ALL_GROUP",
)
_SINGLE = (
    "_WORLD_GROUP",
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP",
    "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE",
    "_MPU_TENSOR_MODEL_PARALLEL_RANK",
    "mesh_device",
    "mpu",
)


def enter(context: RankContext) -> None:
    """Give DeepSpeed this rank's process groups, and let it forget those of the case before.

    Collective only through the groups DeepSpeed asks for: made once per rank tuple by
    `context.new_group`, for which members alone wait.
    """
    from deepspeed import comm

    if not comm.is_initialized():
        _once(context)

    def new_group(ranks: Sequence[int]) -> Any:
        return context.new_group([int(rank) for rank in ranks])

    comm.new_group = new_group
    _forget_groups()


def _once(context: RankContext) -> None:
    """Start DeepSpeed's communication over the world that exists; quieten it."""
    import deepspeed.ops
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    if context.device.type == "cpu":  # else every machine compiles `deepspeed_shm_comm` first
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        # It asks for oneDNN's float16 (AVX-512 FP16), where torch's own kernels run on any CPU.
        get_accelerator().is_fp16_supported = lambda: True
    logger.setLevel(logging.ERROR)
    # It prints, after a full garbage collection: 0.9 of the 1.35 s of a case.
    bf16_optimizer.see_memory_usage = _nothing
    comm.init_distributed(dist_backend=context.backend, auto_mpi_discovery=False)


def _nothing(*_args: object, **_options: object) -> None:
    """Stand in for a function that only prints."""


def _forget_groups() -> None:
    from deepspeed.utils import groups

    release = getattr(groups, "_release_process_group_references", None)
    if release is not None:
        release(None)
        return
    for name in _TABLES:  # releases before 0.19.7 have no such function
        getattr(groups, name, {}).clear()
    for name in _SINGLE:
        if hasattr(groups, name):
            setattr(groups, name, None)
    if hasattr(groups, "expert_tensor_parallel_world_size"):
        groups.expert_tensor_parallel_world_size = 1


def let_presets_read_transformers() -> Callable[[], None]:
    """Make the registry of recorded outputs of transformers 5.23 readable by class name again.

    Its `get` takes a model and no default, its `[]=` a model; AutoEP's presets give both the name
    of a class, and die of a TypeError in `initialize` (docs/findings).

    Returns:
        What puts the registry back as it was.
    """
    try:
        from transformers.utils import output_capturing
    except ImportError:  # an older one, without recorded outputs
        return _nothing
    kind: Any = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    if kind is dict:
        return _nothing
    read, write = kind.get, kind.__setitem__

    def get(registry: Any, key: Any, default: Any = None) -> Any:
        return dict.get(registry, key, default) if isinstance(key, str) else read(registry, key)

    def put(registry: Any, key: Any, value: Any) -> None:
        if isinstance(key, str):
            dict.__setitem__(registry, key, value)
        else:
            write(registry, key, value)

    def back() -> None:
        kind.get, kind.__setitem__ = read, write

    kind.get, kind.__setitem__ = get, put
    return back


def installed() -> str:
    """Give the version of the installed DeepSpeed."""
    import deepspeed

    return str(deepspeed.__version__)
