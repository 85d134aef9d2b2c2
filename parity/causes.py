"""The vocabulary of causes: what may be wrong with a folded step, how it shows, in one line each.

Owns the table that `parity.explain` matches evidence against and that planted faults are mapped
to. Must not know tensors, rows or any implementation. Easy to get wrong: an id names a *class* of
mistakes by what it does to the numbers; two mistakes no number can tell apart share one id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Signature = Literal[
    "scale", "all_scale", "loss_scale", "leak",
    "lanes_differ", "ranks_differ", "drift",
    "wrong_group", "permutation", "sharded_reduced", "dead",
    "shares", "auxiliary", "detached",
    "restore_rows", "restore_scaled", "adjoint", "input_partial", "input_scaled", "dense_partial",
    "dense_summed",
    "altered", "rows", "etp_rows", "swapped", "zeroed",
    "routing", "routing_lanes",
    "norm_high", "norm_low", "norm_scaled", "norm_clipped", "norm_squared",
    "clip", "update", "idle", "checkpoint", "resume", "progress",
    "not_finite", "unknown_factor", "unknown",
]  # fmt: skip
"""How a cause shows; `parity.explain` has one matcher for each."""


@dataclass(frozen=True)
class Setting:
    """What a cause's effect depends on: the sizes of a run and what its case switches on.

    Flags are None where they are not known (rows alone do not say them).
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    edp: int = 1
    gas: int = 1
    sp: int = 1
    clip: float = 0.0
    optimizer: str = "sgd"
    steps: int | None = None
    uneven: bool | None = None
    idle_expert: bool | None = None
    lane_varying: bool | None = None
    auxiliary: bool | None = None
    shared: bool | None = None
    biases: bool | None = None
    tied: bool | None = None
    top_k: int | None = None

    @property
    def stage(self) -> int:
        """Ranks of a stage."""
        return self.tp * self.dp


Factor = Callable[[Setting], float]
Shows = Callable[[Setting], bool | None]

EVERY = ("router", "layernorm", "dense", "attention", "embedding", "expert", "shared_expert")
REPLICATED = ("layernorm", "dense", "attention", "embedding", "shared_expert", "router")


@dataclass(frozen=True)
class Cause:
    """One class of mistakes.

    Attributes:
        id: kebab-case name, stable: it stands in results and reports.
        signature: how it shows.
        algebra: one line of why.
        families: families it can hit.
        symbol: its factor in sizes of the shape, empty where it has none.
        factor: the same as a function.
        shows: whether a run of a setting must (True), may (None) or cannot (False) show it.
        alterations: altered forwards (`parity.hypotheses`) whose loss it gives.
    """

    id: str
    signature: Signature
    algebra: str
    families: tuple[str, ...] = EVERY
    symbol: str = ""
    factor: Factor | None = None
    shows: Shows = lambda _: None
    alterations: tuple[str, ...] = ()

    def visible(self, setting: Setting) -> bool | None:
        """Tell whether a run must, may or cannot show this cause."""
        if self.factor is not None and self.factor(setting) == 1.0:
            return False
        return self.shows(setting)


def _and(*flags: bool | None) -> bool | None:
    """Combine three-valued conditions: one that fails wins, then one that is not known."""
    if any(flag is False for flag in flags):
        return False
    return None if any(flag is None for flag in flags) else True


def _always(_: Setting) -> bool:
    return True


def _lanes(s: Setting) -> bool:
    return s.tp > 1


def _maybe(condition: bool) -> bool | None:
    """Give None where the condition holds: it may show, yet need not."""
    return None if condition else False


_EXPERT = ("expert",)

_FACTORS = (
    Cause(
        "restore-factor-not-cancelled", "scale",
        "the restore's backward sums tp equal lane gradients, and nothing divides by tp",
        _EXPERT, "tp", lambda s: s.tp, _always,
    ),
    Cause(
        "expert-divided-twice-by-tp", "scale",
        "the restore's factor tp is undone twice: tp / tp^2",
        _EXPERT, "1/tp", lambda s: 1 / s.tp, _always,
    ),
    Cause(
        "expert-divided-by-edp", "scale",
        "the sum over edp is divided by edp where dp ranks' batches went into it: dp / edp",
        _EXPERT, "dp/edp", lambda s: s.dp / s.edp, _always,
    ),
    Cause(
        "expert-averaged-over-edp-only", "scale",
        "the mean over edp is taken for the whole rule: (tp dp) / edp = ep etp",
        _EXPERT, "ep*etp", lambda s: s.ep * s.etp, _always,
    ),
    Cause(
        "expert-divided-twice-by-dp", "scale",
        "the divisor dp is applied in the bucket and again in the collective: 1 / dp",
        _EXPERT, "1/dp", lambda s: 1 / s.dp, _always,
    ),
    Cause(
        "expert-divided-by-edp-as-well", "scale",
        "an average over edp follows a division by dp: 1 / edp",
        _EXPERT, "1/edp", lambda s: 1 / s.edp, _always,
    ),
    Cause(
        "expert-not-divided-by-dp", "scale",
        "the sum over edp is never divided by dp",
        _EXPERT, "dp", lambda s: s.dp, _always,
    ),
    Cause(
        "expert-scaled-by-etp", "scale",
        "slices of the expert width are summed as if they were partial gradients: etp",
        _EXPERT, "etp", lambda s: s.etp, _always,
    ),
    Cause(
        "expert-divided-by-etp", "scale",
        "slices of the expert width are averaged as if they were replicas: 1 / etp",
        _EXPERT, "1/etp", lambda s: 1 / s.etp, _always,
    ),
    Cause(
        "router-summed-over-tp", "scale",
        "each lane's router gradient carries tp, their mean is the gradient, their sum tp times it",
        ("router",), "tp", lambda s: s.tp, _always,
    ),
    Cause(
        "router-divided-twice-by-tp", "scale",
        "the mean over lanes is taken twice, or of gradients that carry no factor tp: 1 / tp",
        ("router",), "1/tp", lambda s: 1 / s.tp, _always,
    ),
    Cause(
        "replicated-summed-over-tp", "scale",
        "lanes hold the same gradient of a replicated weight; their sum is tp times it",
        REPLICATED, "tp", lambda s: s.tp, _always,
    ),
    Cause(
        "replicated-divided-by-tp", "scale",
        "a gradient that needs no reduction over lanes is divided by tp",
        REPLICATED, "1/tp", lambda s: 1 / s.tp, _always,
    ),
    Cause(
        "dp-sum-not-averaged", "scale",
        "the sum over dp ranks is not divided by dp",
        EVERY, "dp", lambda s: s.dp, _always,
    ),
    Cause(
        "dp-averaged-twice", "scale",
        "the sum over dp ranks is divided by dp twice",
        EVERY, "1/dp", lambda s: 1 / s.dp, _always,
    ),
    Cause(
        "tied-reduced-twice", "scale",
        "a weight with two names is reduced, or added up, once for each of them",
        ("embedding", "dense"), "2", lambda _: 2.0, lambda s: s.tied,
    ),
    Cause(
        "gas-not-applied", "all_scale",
        "micro-batch gradients are summed and not divided by gas",
        EVERY, "gas", lambda s: s.gas, _always,
    ),
    Cause(
        "gas-applied-twice", "all_scale",
        "loss and gradient are both divided by gas: 1 / gas",
        EVERY, "1/gas", lambda s: 1 / s.gas, _always,
    ),
    Cause(
        "sequence-parallel-divisor", "all_scale",
        "gradients are divided by the sequence-parallel size, whose ranks hold other tokens",
        EVERY, "1/sp", lambda s: 1 / s.sp, _always,
    ),
    Cause(
        "loss-scale-not-undone", "loss_scale",
        "a loss scale (a power of two) is left on the gradients, or divided out without being on",
        EVERY, "2^k",
    ),
)  # fmt: skip

_REDUCTIONS = (
    Cause(
        "tp-reduction-missing", "lanes_differ",
        "each lane keeps its own share's gradient, times tp in the router: replicas differ by lane",
        REPLICATED, shows=lambda s: _maybe(s.tp > 1),
    ),
    Cause(
        "dp-reduction-missing", "ranks_differ",
        "each dp rank keeps the gradient of its own tokens: replicas differ by dp (or edp) rank",
        EVERY, shows=lambda s: True if s.dp > 1 else _maybe(s.edp > 1),
    ),
    Cause(
        "expert-reduced-over-wrong-group", "wrong_group",
        "expert gradients are summed over ranks that hold other experts or other tokens",
        _EXPERT, shows=lambda s: _maybe(s.stage > 1 and (s.tp, s.dp) != (1, s.edp)),
    ),
    Cause(
        "expert-permutation", "permutation",
        "expert e holds what belongs to another: EP ranks permuted, or expert indices shifted",
        EVERY, alterations=("experts-shifted",),
    ),
    Cause(
        "sharded-reduced-over-tp", "sharded_reduced",
        "different shards of one weight are added up over lanes as if they were replicas",
        ("attention", "dense", "shared_expert"), shows=_lanes,
    ),
    Cause(
        "gradient-dropped", "dead",
        "a family's gradient never arrives: detached, not handed to the optimizer, or zeroed",
        EVERY,
    ),
    Cause(
        "shards-permuted", "altered",
        "a rank holds another rank's shard than its placement says: a group in another order",
        EVERY, shows=lambda s: _maybe(s.stage > 1), alterations=("weights-moved",),
    ),
    Cause(
        "tensors-swapped", "swapped",
        "a flat bucket is unpacked in another order: one parameter holds another's gradient",
        EVERY,
    ),
    Cause(
        "elements-lost", "zeroed",
        "elements are zero and all others right: a split drops its remainder, a mask hides a row",
        EVERY,
    ),
    Cause(
        "replicas-drift", "drift",
        "ranks that must agree do not, though what is compared is right: an unsynchronised update",
        EVERY, shows=lambda s: _maybe(s.stage > 1),
    ),
    Cause(
        "precision-leak-float32", "leak",
        "a float64 value passed through float32: error about 6e-8, scale 1",
        EVERY,
    ),
    Cause(
        "precision-leak-bfloat16", "leak",
        "a value passed through bfloat16: error about 3e-3, scale 1",
        EVERY,
    ),
    Cause(
        "precision-leak-float16", "leak",
        "a value passed through float16: error about 3e-4, scale 1",
        EVERY,
    ),
)  # fmt: skip

_SHARES = (
    Cause(
        "micro-batches-overwritten", "shares",
        "accumulation is overwritten, only the last micro-batch is left: shares (0, ..., 0, 1)",
        shows=lambda s: s.gas > 1,
    ),
    Cause(
        "first-micro-batch-lost", "shares",
        "gradients are zeroed after the first backward: shares (0, 1, ..., 1)",
        shows=lambda s: s.gas > 1,
    ),
    Cause(
        "micro-batch-lost", "shares",
        "one micro-batch (not the first) is missing from the sum",
        shows=lambda s: s.gas > 1,
    ),
    Cause(
        "reduced-every-micro-batch", "shares",
        "what is accumulated is reduced again at every micro-batch: shares (q^(n-1), ..., q, 1)",
        shows=lambda s: _maybe(s.gas > 1),
    ),
    Cause(
        "micro-batch-counted-again", "shares",
        "a gradient is reduced before it is complete and again after: a share counts k times",
        shows=lambda s: _maybe(s.gas > 1),
    ),
    Cause(
        "rank-share-lost", "shares",
        "the tokens of a dp rank are missing from the sum",
        shows=lambda s: _maybe(s.dp > 1),
    ),
    Cause(
        "rank-share-counted-again", "shares",
        "the tokens of a dp rank are counted more than once",
        shows=lambda s: _maybe(s.dp > 1),
    ),
    Cause(
        "local-mean-loss", "shares",
        "a mean of local means: share n of N tokens on R ranks and micro-batches weighs N / (R n)",
        shows=lambda s: _and(s.stage * s.gas > s.tp, s.uneven),
    ),
    Cause(
        "gradient-not-zeroed", "shares",
        "the previous step's gradient is still in the sum",
        shows=lambda s: None if s.steps is None else s.steps > 1,
    ),
    Cause(
        "auxiliary-scaled", "auxiliary",
        "auxiliary losses, or one of them, reach the router with a factor: none passes the restore",
        shows=lambda s: _and(s.auxiliary, _maybe(True)),
    ),
    Cause(
        "auxiliary-scope", "auxiliary",
        "the auxiliary loss counts other tokens than the case asks for: other scope, stale load",
        shows=lambda s: _and(s.auxiliary, None),
    ),
    Cause(
        "routing-weights-detached", "detached",
        "routing weights carry no gradient: the router keeps its auxiliary losses only",
    ),
)  # fmt: skip

_BACKWARD = (
    Cause(
        "restore-own-rows-only", "restore_rows",
        "the restore's backward keeps the own lane's gradient, other lanes' parts are lost",
        shows=lambda s: _and(s.tp > 1, s.lane_varying),
    ),
    Cause(
        "restore-not-summed", "restore_scaled",
        "the restore's backward neither sums lanes nor multiplies by tp: 1 / tp from there down",
        symbol="1/tp", factor=lambda s: 1 / s.tp, shows=_lanes,
    ),
    Cause(
        "restore-summed-twice", "restore_scaled",
        "output gradients are summed over lanes twice: tp from there down",
        symbol="tp", factor=lambda s: s.tp, shows=_lanes,
    ),
    Cause(
        "wrong-adjoint", "adjoint",
        "the backward of an all-to-all or gather is not its transpose: rows meet others' gradients",
        shows=lambda s: _maybe(s.ep * s.etp > 1),
    ),
    Cause(
        "input-gradient-partial", "input_partial",
        "the gradient leaving the layer holds the own lane's share: AVERAGE repairs the norm under "
        "it, TP-sharded weights below stay wrong",
        shows=_lanes,
    ),
    Cause(
        "input-gradient-summed", "input_scaled",
        "lanes are summed at the input boundary, where each already carries tp: factor tp",
        symbol="tp", factor=lambda s: s.tp, shows=_lanes,
    ),
    Cause(
        "input-gradient-divided-twice", "input_scaled",
        "the input boundary divides by tp what carries no tp any more: 1 / tp",
        symbol="1/tp", factor=lambda s: 1 / s.tp, shows=_lanes,
    ),
    Cause(
        "dense-input-gradient-partial", "dense_partial",
        "lanes' parts of a TP-sharded block's input gradient are not summed: 1 / tp in its norm",
        symbol="1/tp", factor=lambda s: 1 / s.tp, shows=_lanes,
    ),
    Cause(
        "dense-output-gradient-summed", "dense_summed",
        "the sum of lanes' outputs also sums their equal gradients: tp in the TP-sharded block",
        symbol="tp", factor=lambda s: s.tp, shows=_lanes,
    ),
)  # fmt: skip

_FORWARD = (
    Cause(
        "routing-differs", "routing",
        "tokens go to other experts than the logits say",
    ),
    Cause(
        "routing-differs-between-lanes", "routing_lanes",
        "lanes of one dp rank route the same tokens differently",
        shows=lambda s: _maybe(s.tp > 1),
    ),
    Cause(
        "routing-weight-applied-twice", "altered",
        "a routing weight multiplies rows before the experts and again after them",
        alterations=("weights-squared",), shows=lambda s: True if (s.top_k or 1) > 1 else None,
    ),
    Cause(
        "routing-weights-misplaced", "altered",
        "a token's routing weights meet the rows of its other experts: another order along top-k",
        alterations=("weights-flipped",), shows=lambda s: None if s.top_k is None else s.top_k > 1,
    ),
    Cause(
        "routing-weights-normalization", "altered",
        "routing weights are divided by their sum where the model does not, or the reverse",
        alterations=("weights-normalized", "weights-not-normalized"),
    ),
    Cause(
        "rows-lost-or-shifted", "rows",
        "a split of rows is off: a token's row is dropped, or another's comes back in its place",
        shows=lambda s: _maybe(s.ep > 1 or s.tp > 1),
    ),
    Cause(
        "etp-rows-lost", "etp_rows",
        "expert-TP ranks exchange rows on one side only: partial outputs, or lost rows",
        shows=lambda s: s.etp > 1,
    ),
    Cause(
        "shared-expert-scaled", "altered",
        "the shared expert's output is summed over lanes that hold it whole: tp times it",
        symbol="tp", factor=lambda s: s.tp, alterations=("shared-times-tp",),
        shows=lambda s: _and(s.tp > 1, s.shared),
    ),
    Cause(
        "bias-added-on-every-lane", "altered",
        "a replicated bias is added on every lane before their sum: tp times it",
        symbol="tp", factor=lambda s: s.tp, alterations=("bias-times-tp",),
        shows=lambda s: _and(s.tp > 1, s.biases),
    ),
)  # fmt: skip

_STEP = (
    Cause(
        "norm-counts-replicas", "norm_high",
        "shards held by several ranks are counted once for each of them in the global norm",
        shows=lambda s: _maybe(s.stage > 1),
    ),
    Cause(
        "norm-shards-not-combined", "norm_low",
        "squares of different shards are averaged, or left out, where they must be added up",
        shows=lambda s: _maybe(s.stage > 1),
    ),
    Cause(
        "norm-scaled", "norm_scaled",
        "the norm of gradients that still carry a factor, or lost it twice: gas, ranks, loss scale",
    ),
    Cause(
        "norm-after-clipping", "norm_clipped",
        "the norm is read after the gradients were clipped: the limit itself",
        symbol="clip", shows=lambda s: 0 < s.clip < 1,
    ),
    Cause(
        "norm-not-rooted", "norm_squared",
        "the sum of squares is given for its root",
    ),
    Cause(
        "clip-not-applied", "clip",
        "the coefficient never meets the update: clipping ignored, or after the optimizer step",
        # a limit above the first norm may be met later; Adam hides a factor but for eps
        symbol="1/clip",
        shows=lambda s: _and(
            s.clip > 0, (s.clip < 1 and s.optimizer in ("sgd", "momentum")) or None
        ),
    ),
    Cause(
        "optimizer-skips-idle", "idle",
        "an expert without tokens has no gradient at all: momentum and decay are skipped",
        _EXPERT, shows=lambda s: _and(s.idle_expert, _maybe(True)),
    ),
    Cause(
        "update-rule-differs", "update",
        "the weights' delta is not what the optimizer makes of the engine's own gradients",
    ),
    Cause(
        "checkpoint-family-swap", "checkpoint",
        "an expert's shard is saved or loaded by the dense placement",
    ),
    Cause(
        "checkpoint-optimizer-stale", "resume",
        "weights come back and optimizer state does not, or that of another layout does",
    ),
    Cause(
        "resume-progress-lost", "progress",
        "weights and optimizer state come back; a counter, a schedule or a group's options do not",
    ),
    Cause(
        "not-finite", "not_finite",
        "a loss or gradient is infinite or no number: division by a count of zero, overflow",
    ),
    Cause(
        "unknown-factor", "unknown_factor",
        "one factor on all that differs, and no known cause has it on this shape",
    ),
    Cause(
        "unknown", "unknown",
        "no known cause fits",
    ),
)  # fmt: skip

CAUSES: tuple[Cause, ...] = (
    *_FACTORS, *_REDUCTIONS, *_SHARES, *_BACKWARD, *_FORWARD, *_STEP,
)  # fmt: skip
BY_ID: Mapping[str, Cause] = MappingProxyType({cause.id: cause for cause in CAUSES})
