"""What Megatron-Core keeps in its modules, and what it asks CUDA for, on warm ranks without CUDA.

Owns the process groups of a case and the shim: every call of Megatron's that only a GPU answers has
its stand-in here, for as long as a context is entered and never longer. Must not know cases, models
or gradients. Easy to get wrong: `parallel_state` serves the groups of the *first* shape for ever
unless it is told to forget them.

Groups with equal ranks are one object here, where Megatron would make one for each purpose.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from parity.hugging_face import lifted
from parity.implementation import RankContext


def installed() -> str | None:
    """Give the version of the installed Megatron-Core, or None."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return None


def enter(context: RankContext) -> None:
    """Give Megatron this rank's process groups, and let it forget those of the case before.

    Collective only through the groups Megatron asks for: made once per rank tuple by
    `context.new_group`, for which members alone wait.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as rng
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router_replay import RouterReplay

    def create_group(ranks: Sequence[int], **_: object) -> Any:
        return context.new_group([int(rank) for rank in ranks])

    parallel_state.destroy_model_parallel()
    sizes = context.layout
    with mock.patch.object(parallel_state, "create_group", create_group):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tp,
            expert_model_parallel_size=sizes.ep,
            expert_tensor_parallel_size=sizes.etp,
            create_gloo_process_groups=False,
        )
    # The tracker without states: weights are overwritten and nothing is dropped out.
    rng.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    RouterReplay.clear_global_router_replay_instances()


@contextlib.contextmanager
def running(dtype: torch.dtype) -> Iterator[None]:
    """Run Megatron on a CPU, in float64 without its casts to float32."""
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of packages it would like to have
        stack.enter_context(_cpu())
        if dtype is torch.float64:
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float64)
            stack.enter_context(lifted())
        yield


# ---------------------------------------------------------------- the shim


@contextlib.contextmanager
def _cpu() -> Iterator[None]:
    """Answer on a CPU what Megatron asks of CUDA."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    stand_ins: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _NoStream,
        "Stream": _NoStream,
        "stream": contextlib.nullcontext,
    }
    with (
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),  # finding 0019
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
        mock.patch.object(dist, "all_gather", _all_gather),
        torch.compiler.set_stance("force_eager"),  # fused helpers would be compiled in each rank
        _OnCpu(),
    ):
        yield


def _on_host(tensor: Tensor, as_numpy: bool = False, **_: object) -> Any:
    """Give split sizes as NumPy, which Megatron does with those that come from a GPU only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _all_gather(parts: list[Tensor], own: Tensor, group: Any = None) -> None:
    """Gather parts of different sizes, which NCCL does by the same broadcasts and Gloo refuses.

    all-gather over group; no gradient (Megatron wraps it); every rank of the group calls it.
    """
    for part, source in zip(parts, dist.get_process_group_ranks(group), strict=True):
        if source == dist.get_rank():
            part.copy_(own)
        dist.broadcast(part, source, group)


class _NoStream:
    """A CUDA stream, and its event, where everything has happened already."""

    def wait_stream(self, _other: object) -> None:
        """Wait for nothing."""

    def record_event(self) -> _NoStream:
        """Give what can be waited for."""
        return self

    def synchronize(self) -> None:
        """Wait for nothing."""


class _OnCpu(TorchFunctionMode):
    """Put on the CPU what is asked for on CUDA by name."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        answer = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(answer, str):  # asserted to be CUDA's float32
            answer = answer.replace("torch.", "torch.cuda.").replace("Double", "Float")
        return answer
