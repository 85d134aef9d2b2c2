"""The faults: what each does at which point, what it imitates, where it shows, what its cause is.

Owns the declarations and the conditions under which a fault can and cannot show. Must not know how
a case is run or a cause is found. Easy to get wrong: `needs` says where a fault *must* be seen, so
every case chosen by it that passes is a fault survived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from parity.case import Case
from parity.layout import Layout
from parity.trial import Planted

_MODULE = "parity.faults.transforms"
_NATIVE = (
    "batch.loss", "step.", "norm.", "clip.", "reduce.due", "reduce.gradient", "reduce.bucket",
    "reduce.reduced",
)  # fmt: skip
"""Points that fold_impl on DeepSpeed's engine does not pass at every stage."""
OWN = frozenset(
    {
        "router-bias-sum", "norm-bias-local", "embedding-sum", "dense-dp-sum",
        "sharded-world-mean", "sharded-averaged", "expert-etp-mean", "expert-unreduced",
        "restore-not-summed", "input-grad-sum", "experts-swapped-on-a-lane", "rows-rolled",
        "weights-detached-on-a-lane", "combine-weights-flipped", "weights-renormalized",
        "lanes-leave-summed", "lanes-enter-raw", "boundary-early", "rank-share-lost",
        "rank-share-doubled", "aux-counted-twice", "aux-tokens-count-lanes", "aux-stale-counts",
        "bucket-last-element", "expert-w1-w3-swapped", "embedding-padding-row", "router-float32",
        "norm-local", "norm-averaged", "norm-gas-left", "norm-after-clipping", "norm-squared",
        "optimizer-state-lost", "optimizer-state-swapped", "decay-ignored",
        "stale-gradient", "decay-coupled", "betas-swapped", "gradient-not-zeroed", "row-dropped",
        "router-jitter-by-lane", "reduction-forgotten", "clip-scales-up",
    }
)  # fmt: skip
"""Findings of our own; every other fault is a row of the public catalogue."""


@dataclass(frozen=True)
class Blind:
    """Where a fault is invisible, and the line of algebra that says so.

    `exact` is the condition under which even the bits agree: numbers that are equal by algebra
    may be rounded in another order.
    """

    when: str
    algebra: str
    exact: str = "True"


@dataclass(frozen=True)
class Variant:
    """The same fault by another amount or kind; what is None is the fault's own."""

    id: str
    true_cause: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    point: str | None = None
    transform: str | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        id: kebab-case name.
        point: named point of the implementation.
        transform: name in `parity.faults.transforms`.
        true_cause: id in `parity.causes`.
        signature: what the full gradient shows (s scale, r residual).
        needs: condition over `facts` of a case under which it must be seen.
        options: given to the transformation; text that begins with "=" is a number over `facts`.
        imitates: the mistake behind it, with its public reference where there is one.
        cannot: where algebra says that it is invisible.
        variants: further amounts, counted with the fault.
        real: whether it is also shown once on ranks that are processes, in float32.
        native: whether it acts on what the native engine alone has: a reduction over groups that
            ZeRO's partitions do not know. Every other fault whose point DeepSpeed's engine passes
            is also shown once there.
    """

    id: str
    point: str
    transform: str
    true_cause: str
    signature: str
    needs: str = "True"
    options: Mapping[str, Any] = field(default_factory=dict)
    imitates: str = ""
    cannot: tuple[Blind, ...] = ()
    variants: tuple[Variant, ...] = ()
    real: bool = False
    native: bool = False

    def can_show(self, case: Case) -> bool:
        """Tell whether the case must show the fault."""
        if case.engine.name != "native" and (self.native or self.point.startswith(_NATIVE)):
            return False
        return bool(holds(self.needs, case))

    def planted(self, case: Case) -> Planted:
        """Give what every rank of a case plants."""
        options = {k: _number(v, case) for k, v in self.options.items()}
        return Planted(self.point, f"{_MODULE}:{self.transform}", options)

    def all_variants(self) -> tuple[Fault, ...]:
        """Give the fault and its variants, each as a fault of its own id."""
        return (self, *(self._as(variant) for variant in self.variants))

    def _as(self, variant: Variant) -> Fault:
        own = variant.transform is None
        return replace(
            self,
            id=f"{self.id}:{variant.id}",
            true_cause=variant.true_cause or self.true_cause,
            point=variant.point or self.point,
            transform=variant.transform or self.transform,
            needs=variant.needs or self.needs,
            real=False,
            options={**(self.options if own else {}), **variant.options},
            variants=(),
            cannot=(),
        )


def facts(case: Case) -> dict[str, Any]:
    """Name what conditions and amounts may speak about."""
    layout, model, engine = case.layout, case.model, case.engine
    counts = range(case.data.length, case.data.length + (layout.dp * engine.gas or 1))
    tokens = [n * case.data.sequences for n in (counts if case.data.uneven else counts[:1])]
    auxiliary = case.auxiliary
    return {
        **{axis: getattr(layout, axis) for axis in ("world", "tp", "dp", "ep", "etp", "edp")},
        "gas": engine.gas, "clip": engine.clip, "dtype": engine.dtype, "backend": engine.backend,
        "optimizer": case.optimizer.name, "decay": case.optimizer.weight_decay,
        "steps": case.steps,
        "aux": auxiliary.active,
        "balance": auxiliary.load_balance > 0, "scope": auxiliary.scope,
        "lanes": case.data.lane_varying, "uneven": case.data.uneven, "idle": case.data.idle_expert,
        "ragged": any(n % layout.tp for n in tokens),
        "biases": model.biases, "tied": model.tied, "shared": model.shared_width > 0,
        "top_k": model.top_k, "normalize": model.normalize, "experts": model.experts,
        "same_groups": _same_groups(layout),
    }  # fmt: skip


def _same_groups(layout: Layout) -> bool:
    """Tell whether dense-DP groups and expert-DP groups are the same groups of ranks."""
    return set(map(frozenset, layout.groups("dp"))) == set(map(frozenset, layout.groups("edp")))


def holds(condition: str, case: Case) -> Any:
    """Evaluate a condition or an amount of this module over the facts of a case."""
    return eval(condition, {"__builtins__": {"range": range, "min": min}}, facts(case))


def _number(value: Any, case: Case) -> Any:
    if isinstance(value, str) and value.startswith("="):
        return holds(value[1:], case)
    return value


def _options(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType(options)


_ROUTER, _NORMS, _EXPERTS = ("router",), ("layernorm",), ("expert",)
_SHARDED = r"attention\.[qkvo]\.weight|mlp\.w[123]\.weight"
_TINY = "dtype == 'float64'"
_EQUAL_LANES = "tp > 1 and not lanes"
_REBUCKETED = "world <= 4"
"""Another rule is another bucket, and a sum over five ranks or more rounds by place in a bucket."""


def _factors(families: tuple[str, ...], inverse: str) -> tuple[Variant, ...]:
    """Give the other amounts of a scale fault: 1/tp, 1.001 and, in float64, 1 + 1e-6."""
    by = {"point": "reduce.reduced", "transform": "scaled"}

    def amount(factor: Any) -> Mapping[str, Any]:
        return _options(factor=factor, families=families)

    return (
        Variant("1/tp", inverse, amount("=1/tp"), **by),
        Variant("1.001", "unknown-factor", amount(1.001), **by),
        Variant("1+1e-6", "unknown-factor", amount(1 + 1e-6), **by, needs=_TINY),
    )


# ---------------------------------------------------------------- one rule per family

_RULES = (
    Fault(
        "router-sum", "reduce.rule", "other_rule", "router-summed-over-tp",
        "router s = tp; Adam hides", "tp > 1", _options(rule="SUM", families=_ROUTER),
        imitates="rule of own-token slices applied to a route-full router",
        cannot=(Blind("tp == 1", "sum over one lane = mean over one lane", _REBUCKETED),),
        variants=_factors(_ROUTER, "router-divided-twice-by-tp"), real=True,
    ),
    Fault(
        "router-skip", "reduce.rule", "other_rule", "tp-reduction-missing",
        "router s, r irregular (own share x tp); replicas differ", "tp > 1",
        _options(rule="SKIP", families=_ROUTER),
        imitates="router counted as TP-sharded",
        cannot=(Blind("tp == 1", "the stage is the dp group: AVERAGE = SKIP", _REBUCKETED),),
    ),
    Fault(
        "router-bias-sum", "reduce.rule", "other_rule", "router-summed-over-tp",
        "router bias s = tp, router weight right", "tp > 1 and biases",
        _options(rule="SUM", pattern=r"router\.bias"),
        imitates="a bias matched by another pattern than its weight",
    ),
    Fault(
        "expert-uncancelled", "reduce.rule", "other_rule", "restore-factor-not-cancelled",
        "expert s = tp; Adam hides", "tp > 1", _options(rule="EXPERT", families=_EXPERTS),
        imitates="rule of own-token slices applied to route-full experts",
        cannot=(Blind("tp == 1", "dp = tp dp", _REBUCKETED),),
        variants=_factors(_EXPERTS, "expert-divided-twice-by-tp")[1:],
    ),
    Fault(
        "expert-double-cancel", "reduce.reduced", "scaled", "expert-divided-twice-by-tp",
        "expert s = 1/tp", "tp > 1", _options(factor="=1/tp", families=_EXPERTS),
        imitates="boundary and optimizer path both cancel the restore's factor",
        cannot=(Blind("tp == 1", "1 / tp = 1"),),
    ),
    Fault(
        "layernorm-sum", "reduce.rule", "other_rule", "replicated-summed-over-tp",
        "layernorm s = tp", "tp > 1", _options(rule="SUM", families=_NORMS),
        imitates="rule of sequence-parallel norms applied to replicated inputs",
        cannot=(Blind("tp == 1", "sum over one lane = mean over one lane", _REBUCKETED),),
        variants=_factors(_NORMS, "replicated-divided-by-tp"),
    ),
    Fault(
        "layernorm-skip", "reduce.rule", "other_rule", "tp-reduction-missing",
        "layernorm replicas differ by lane", "tp > 1 and lanes",
        _options(rule="SKIP", families=_NORMS),
        imitates="norms left out of the reduction over lanes",
        cannot=(
            Blind(
                _EQUAL_LANES, "behind the input boundary g_p = g on every lane: sum_p g / tp = g",
                "tp == 2 and dp == 1",
            ),
        ),
    ),
    Fault(
        "norm-bias-local", "reduce.rule", "rule_over", "dp-reduction-missing",
        "layernorm biases differ by dp rank, weights right", "dp > 1 and biases",
        _options(over="tp", divisor="=tp", pattern=r"norm\.bias"),
        imitates="biases left out of the data-parallel buckets",
        cannot=(Blind("dp == 1", "the stage is the tp group", _REBUCKETED),),
        native=True,
    ),
    Fault(
        "embedding-sum", "reduce.rule", "other_rule", "replicated-summed-over-tp",
        "embedding s = tp", "tp > 1 and not tied", _options(rule="SUM", families=("embedding",)),
        imitates="rule of a vocabulary-parallel embedding applied to a whole one",
        cannot=(Blind("tp == 1", "sum over one lane = mean over one lane", _REBUCKETED),),
    ),
    Fault(
        "dense-dp-sum", "reduce.reduced", "scaled", "dp-sum-not-averaged",
        "every dense family s = dp", "dp > 1",
        _options(
            factor="=dp", families=("router", "layernorm", "dense", "attention", "embedding")
        ),
        imitates="communication hook that sums and does not divide",
        cannot=(Blind("dp == 1", "sum over one rank = mean over one rank"),),
    ),
    Fault(
        "sharded-world-mean", "reduce.rule", "rule_over", "replicated-divided-by-tp",
        "TP-sharded dense and attention s = 1/tp", "tp > 1",
        _options(over="dp", divisor="=tp*dp", only="SKIP"),
        imitates="averaging over the world size where the data-parallel size is due",
        cannot=(Blind("tp == 1", "tp dp = dp", _REBUCKETED),),
    ),
    Fault(
        "sharded-averaged", "reduce.rule", "other_rule", "sharded-reduced-over-tp",
        "shards of different lanes mixed: large r", "tp > 1", _options(rule="AVERAGE", only="SKIP"),
        imitates="TP-sharded weights treated as replicated",
        cannot=(Blind("tp == 1", "the stage is the dp group: AVERAGE = SKIP", _REBUCKETED),),
        native=True,
    ),
    Fault(
        "expert-edp-mean", "reduce.reduced", "scaled", "expert-divided-by-edp",
        "expert s = dp/edp", "ep * etp != tp", _options(factor="=dp/edp", families=_EXPERTS),
        imitates="DeepSpeed #6545, PyTorch #160285",
        cannot=(Blind("ep * etp == tp", "tp dp = ep etp edp, so ep etp = tp gives edp = dp"),),
        real=True,
    ),
    Fault(
        "expert-scaled-twice", "reduce.reduced", "scaled", "expert-divided-twice-by-dp",
        "expert s = 1/dp, or 1/edp", "dp > 1", _options(factor="=1/dp", families=_EXPERTS),
        imitates="DeepSpeed #4957",
        cannot=(Blind("dp == 1", "1 / dp = 1"),),
        variants=(
            Variant(
                "edp", "expert-divided-by-edp-as-well", _options(factor="=1/edp"), needs="edp > 1"
            ),
        ),
    ),
    Fault(
        "expert-etp-mean", "reduce.reduced", "scaled", "expert-divided-by-etp",
        "expert s = 1/etp", "etp > 1", _options(factor="=1/etp", families=_EXPERTS),
        imitates="slices of the expert width averaged as if they were replicas",
        cannot=(Blind("etp == 1", "1 / etp = 1"),),
    ),
    Fault(
        "expert-wrong-group", "reduce.rule", "rule_over", "expert-reduced-over-wrong-group",
        "other experts' columns mixed in; replicas differ", "not same_groups",
        _options(over="dp", divisor="=tp*dp", families=_EXPERTS),
        imitates="Megatron-LM #1628",
        cannot=(Blind("same_groups", "dp groups and edp groups are the same ranks", _REBUCKETED),),
        native=True,
    ),
    Fault(
        "expert-unreduced", "reduce.rule", "rule_over", "dp-reduction-missing",
        "expert replicas differ by edp rank", "edp > 1 and etp == 1",
        _options(over="etp", divisor="=tp*dp", families=_EXPERTS),
        imitates="expert parameters left out of every data-parallel group",
        cannot=(Blind("edp == 1 and etp == 1", "the edp group is the rank alone", _REBUCKETED),),
        native=True,
    ),
    Fault(
        "tied-embedding-twice", "reduce.gradient", "scaled", "tied-reduced-twice",
        "embedding s = 2", "tied", _options(factor="=1 + tied", families=("embedding",)),
        imitates="tied weights added up once for each of their names",
        cannot=(Blind("not tied", "the weight has one name"),),
    ),
    Fault(
        "zero0-loss-scale", "reduce.reduced", "scaled", "loss-scale-not-undone",
        "all s = 2^-16", "True", _options(factor=2.0**-16),
        imitates="DeepSpeed #7837",
    ),
)  # fmt: skip

# ---------------------------------------------------------------- the folded layer

_LAYER = (
    Fault(
        "restore-own-rows", "moe.restore", "restores_own_rows", "restore-own-rows-only",
        "wrong with a lane-varying consumer only", "tp > 1 and lanes", _options(times_lanes=True),
        imitates="all-gather whose backward is a slice",
        cannot=(
            Blind(
                _EQUAL_LANES, "lanes send equal gradients g: sum_p g = tp g = tp own",
                "tp in (2, 3)",
            ),
        ),
    ),
    Fault(
        "restore-not-summed", "moe.restore", "restores_own_rows", "restore-not-summed",
        "router and expert s = 1/tp, everything below wrong", "tp > 1", _options(times_lanes=False),
        imitates="all-gather whose backward is a slice, under rules that cancel its sum",
        cannot=(Blind("tp == 1", "one lane has all rows"),),
    ),
    Fault(
        "input-grad-partial", "moe.input", "enters_raw", "input-gradient-partial",
        "norm under the layer right, TP-sharded weights below wrong at scale ~1", "tp > 1",
        imitates="layer input without a boundary",
        cannot=(Blind("tp == 1", "the own lane's share is all"),), real=True,
    ),
    Fault(
        "input-grad-sum", "moe.input", "enters_summed", "input-gradient-summed",
        "everything below the layer: MoE path x tp", "tp > 1",
        imitates="Megatron's f at the boundary of a layer whose gradient carries tp",
        cannot=(Blind("tp == 1", "sum over one lane"),),
    ),
    Fault(
        "router-jitter-by-lane", "router.logits", "flipped", "routing-differs-between-lanes",
        "lanes route the same tokens differently", "tp > 1", _options(lanes=(1,), tp="=tp"),
        imitates="router jitter drawn from each lane's own generator",
        cannot=(Blind("tp == 1", "there is no second lane"),),
    ),
    Fault(
        "ep-group-order", "groups.table", "reordered_table", "expert-permutation",
        "experts permuted", "ep > 1", _options(of="ep"),
        imitates="EP ranks numbered against the order of the process group",
        cannot=(Blind("ep == 1", "a group of one has one order"),),
        native=True,
    ),
    Fault(
        "expert-index-roll", "dispatch.experts", "shifted_experts", "expert-permutation",
        "rows of expert e at e+1", "experts > 1", _options(experts="=experts"),
        imitates="expert index counted from 1",
    ),
    Fault(
        "experts-swapped-on-a-lane", "dispatch.experts", "swapped_experts", "rows-lost-or-shifted",
        "two experts' rows exchanged on one lane", "tp > 1",
        _options(pair=(0, 1), lanes=(1,), tp="=tp"),
        imitates="count exchange transposed for one rank",
        cannot=(Blind("tp == 1", "there is no second lane"),),
    ),
    Fault(
        "split-off-by-one", "dispatch.share", "truncated_share", "rows-lost-or-shifted",
        "r small, the last row of a share", "ragged", _options(lanes_of_group="=tp"),
        imitates="floor where an uneven split needs ceil",
        cannot=(Blind("not ragged", "floor = ceil where tp divides the tokens"),),
    ),
    Fault(
        "row-dropped", "dispatch.rows", "zeroed", "rows-lost-or-shifted",
        "the last assignment of every share is lost", "top_k > 1", _options(at=-1),
        imitates="expert capacity that drops what comes last",
    ),
    Fault(
        "rows-rolled", "dispatch.received", "rolled", "rows-lost-or-shifted",
        "every row through its neighbour's place", "True",
        imitates="un-permutation with other indices than the permutation",
    ),
    Fault(
        "a2a-wrong-adjoint", "dispatch.exchange", "adjoint_with_forward_splits", "wrong-adjoint",
        "structural r", "ep > 1 and uneven", _options(ways=("there",)),
        imitates="all-to-all whose backward uses the forward splits",
        cannot=(Blind("ep == 1", "no all-to-all"),),
    ),
    Fault(
        "prob-gather-detached", "router.weights", "detached", "routing-weights-detached",
        "router keeps the auxiliary part only", "aux and (top_k > 1 or not normalize)",
        imitates="routing weights gathered by a collective without autograd",
        cannot=(
            Blind(
                "top_k == 1 and normalize", "one normalised weight is w / w = 1, a constant",
                "False",
            ),
        ),
    ),
    Fault(
        "weights-detached-on-a-lane", "combine.weights", "detached", "routing-weights-detached",
        "router loses one lane's share of the main loss", "tp > 1 and top_k > 1 and aux",
        _options(lanes=(1,), tp="=tp"),
        imitates="received weights replaced by a copy that carries no gradient",
        cannot=(Blind("tp == 1", "there is no second lane"),),
    ),
    Fault(
        "combine-weights-twice", "combine.weights", "squared", "routing-weight-applied-twice",
        "forward differs", "top_k > 1 or not normalize",
        imitates="score applied before the experts and again in combine",
        cannot=(Blind("top_k == 1 and normalize", "w / w = 1 and 1^2 = 1", "False"),),
    ),
    Fault(
        "combine-weights-flipped", "combine.weights", "flipped", "routing-weights-misplaced",
        "forward differs: weights meet the other expert's row", "top_k > 1",
        imitates="top-k indices sorted, weights not",
        cannot=(Blind("top_k == 1", "a row of one has one order"),),
    ),
    Fault(
        "weights-renormalized", "router.weights", "renormalized", "routing-weights-normalization",
        "forward differs", "not normalize",
        imitates="norm_topk_prob = false not read",
        cannot=(Blind("normalize", "weights that add up to 1 stay as they are", "False"),),
    ),
    Fault(
        "etp-all-gather-only", "expert.scatter", "own_rows_unreduced", "etp-rows-lost",
        "forward and loss differ, shares lost", "etp > 1",
        imitates="expert-TP input gathered, output not reduce-scattered",
        cannot=(Blind("etp == 1", "no expert-TP collective"),),
    ),
    Fault(
        "shared-expert-dispatch", "shared.output", "scaled", "shared-expert-scaled",
        "forward differs; shared_expert scaled by tp", "tp > 1 and shared", _options(factor="=tp"),
        imitates="shared expert summed over lanes that hold it whole",
        cannot=(Blind("tp == 1", "sum over one lane"),),
    ),
    Fault(
        "bias-times-tp", "linear.bias", "scaled", "bias-added-on-every-lane",
        "forward differs; bias s = tp", "tp > 1 and biases", _options(factor="=tp"),
        imitates="torchtitan #4245",
        cannot=(Blind("tp == 1", "one lane adds it once"),),
    ),
    Fault(
        "lanes-leave-summed", "lanes.leave", "leaves_summed", "dense-output-gradient-summed",
        "TP-sharded branches and what is below them x tp", "tp > 1 and not shared",
        imitates="torch.distributed.nn all_reduce: sums in forward and in backward",
        cannot=(Blind("tp == 1", "sum over one lane"),),
    ),
    Fault(
        "lanes-enter-raw", "lanes.enter", "enters_raw", "dense-input-gradient-partial",
        "norms over TP-sharded blocks s = 1/tp, below them wrong", "tp > 1",
        imitates="column-parallel input without Megatron's f",
        cannot=(Blind("tp == 1", "the lane's part is all"),),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- losses and accumulation

_ACCUMULATION = (
    Fault(
        "local-mean-loss", "batch.inputs", "local_mean_loss", "local-mean-loss",
        "shares G/(R n_r)", "uneven and dp * gas > 1",
        imitates="transformers #34191, torchtitan #1842",
        cannot=(Blind("not uneven", "R n tokens on R shares: R / (R n) = 1 / n"),),
    ),
    Fault(
        "gas-missing", "batch.loss", "scaled", "gas-not-applied", "all s = gas", "gas > 1",
        _options(factor="=gas"), imitates="loss not divided by the accumulation steps",
        cannot=(Blind("gas == 1", "1 / gas = 1"),),
    ),
    Fault(
        "gas-twice", "batch.loss", "scaled", "gas-applied-twice", "all s = 1/gas", "gas > 1",
        _options(factor="=1/gas"), imitates="trainer and engine both divide by gas",
        cannot=(Blind("gas == 1", "1 / gas = 1"),),
    ),
    Fault(
        "last-microbatch-only", "step.accumulate", "dropped", "micro-batches-overwritten",
        "shares (0, .., 0, 1)", "gas > 1", _options(micro_batches="=range(-gas, -1)"),
        imitates="DeepSpeed #7981",
        cannot=(Blind("gas == 1", "the last is the only one"),),
    ),
    Fault(
        "first-microbatch-lost", "step.accumulate", "dropped", "first-micro-batch-lost",
        "shares (0, 1, .., 1)", "gas > 2", _options(micro_batches="=range(min(1, gas - 1))"),
        imitates="zero_grad after the first backward",
        cannot=(Blind("gas == 1", "nothing comes after the first"),),
    ),
    Fault(
        "not-ready-reduced", "step.accumulate", "scaled", "micro-batch-counted-again",
        "shares (2, 1, .., 1)", "gas > 1",
        _options(factor=2.0, micro_batches="=range(min(1, gas - 1))"),
        imitates="gradient reduced while ds_grad_is_ready is False",
        cannot=(Blind("gas == 1", "the step ends with the first micro-batch"),),
    ),
    Fault(
        "reduce-each-microbatch", "reduce.due", "replaced", "reduced-every-micro-batch",
        "expert shares (q^(n-1), .., q, 1), q = 1/(ep etp)", "gas > 1 and ep * etp > 1",
        _options(by=True), imitates="reduction outside the accumulation boundary",
        cannot=(Blind("gas == 1", "every micro-batch is the boundary"),),
    ),
    Fault(
        "reduction-forgotten", "reduce.due", "replaced", "dp-reduction-missing",
        "every rank keeps its own gradient", "dp > 1", _options(by=False),
        imitates="an engine whose step leaves the reduction to its caller",
    ),
    Fault(
        "boundary-early", "step.boundary", "first_micro_batch_ends", "micro-batch-lost",
        "shares (1, 0, .., 0)", "gas > 1",
        imitates="micro-step counted from 0 where the boundary counts from 1",
        cannot=(Blind("gas == 1", "first = last"),),
    ),
    Fault(
        "gradient-not-zeroed", "reduce.reduced", "Leftover", "gradient-not-zeroed",
        "second step: the first step's gradient added", "steps > 1",
        imitates="zero_grad left out, or of other tensors than the optimizer's",
        cannot=(Blind("steps == 1", "there is no step before"),),
    ),
    Fault(
        "rank-share-lost", "reduce.gradient", "scaled", "rank-share-lost",
        "the tokens of one dp rank are missing", "dp > 1",
        _options(factor=0.0, dp_ranks="=(dp - 1,)", tp="=tp"),
        imitates="a rank that joins the reduction with zeros (uneven inputs)",
    ),
    Fault(
        "rank-share-doubled", "reduce.gradient", "scaled", "rank-share-counted-again",
        "the tokens of one dp rank count twice", "dp > 1",
        _options(factor=2.0, dp_ranks=(0,), tp="=tp"),
        imitates="a rank listed twice in a hierarchical reduction",
    ),
    Fault(
        "aux-scaled-by-restore", "auxiliary.loss", "gradient_scaled", "auxiliary-scaled",
        "router r, ratio ~1", "tp > 1 and aux", _options(factor="=tp"),
        imitates="auxiliary loss attached behind the restore",
        cannot=(Blind("tp == 1", "tp = 1"),),
        variants=(
            Variant("1/tp", None, _options(factor="=1/tp")),
            Variant("gas", None, _options(factor="=gas"), needs="gas > 1 and aux"),
        ),
    ),
    Fault(
        "aux-counted-twice", "auxiliary.loss", "scaled", "auxiliary-scaled",
        "loss and router: auxiliary part x 2", "aux", _options(factor=2.0),
        imitates="auxiliary loss added by the layer and by the trainer",
        cannot=(Blind("not aux", "2 * 0 = 0"),),
    ),
    Fault(
        "aux-per-rank", "auxiliary.scope", "replaced", "auxiliary-scope",
        "router r", "dp > 1 and aux and scope == 'global'", _options(by="rank"),
        imitates="load balance from local counts",
        cannot=(Blind("dp == 1", "the rank's tokens are all tokens"),),
    ),
    Fault(
        "aux-tokens-count-lanes", "auxiliary.tokens", "scaled", "auxiliary-scope",
        "router: balance / tp^2, z / tp", "tp > 1 and aux", _options(factor="=tp"),
        imitates="token counts all-reduced over lanes that see the same tokens",
        cannot=(Blind("tp == 1", "one lane counts once"),),
    ),
    Fault(
        "aux-stale-counts", "auxiliary.load", "Stale", "auxiliary-scope",
        "router r small", "gas > 1 and balance",
        imitates="load of the micro-batch before",
        cannot=(Blind("gas == 1 and steps == 1", "there is none before"),),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- buckets and precision

_BUCKETS = (
    Fault(
        "bucket-last-element", "reduce.bucket", "zeroed", "elements-lost",
        "one element of a bucket is zero", "True", _options(at=-1),
        imitates="bucket split that drops the remainder",
    ),
    Fault(
        "expert-w1-w3-swapped", "reduce.bucket", "swapped_members", "tensors-swapped",
        "w1 and w3: ratio ~1, scale ~0", "True",
        _options(patterns=(r"experts\.w1", r"experts\.w3")),
        imitates="flat bucket unpacked in another order than packed",
    ),
    Fault(
        "embedding-padding-row", "reduce.gradient", "zeroed", "elements-lost",
        "one row of the embedding is zero", "not tied", _options(at=1, families=("embedding",)),
        imitates="padding_idx of another tokenizer",
    ),
    Fault(
        "downcast-reduce", "reduce.bucket", "rounded", "precision-leak-float32",
        "leak: residual like round-off, scale 1", _TINY, _options(to="float32"),
        imitates="communication_data_type below the gradient's",
        variants=(
            Variant("bfloat16", "precision-leak-bfloat16", _options(to="bfloat16")),
            Variant("float16", "precision-leak-float16", _options(to="float16")),
        ),
    ),
    Fault(
        "router-float32", "router.logits", "rounded", "precision-leak-float32",
        "leak from the router down", _TINY, _options(to="float32"),
        imitates="router forced to float32 in a float64 run",
    ),
)  # fmt: skip

# ---------------------------------------------------------------- norm, clip, optimizer

_STEP = (
    Fault(
        "zero-token-none", "step.gradient", "dropped_if_zero", "optimizer-skips-idle",
        "update differs, gradient equal", "idle and experts == ep and decay > 0",
        _options(families=_EXPERTS), imitates="Automodel #2995",
        cannot=(Blind("decay == 0 and optimizer == 'sgd'", "w - lr 0 = w"),),
        variants=(
            Variant("gradient", None, _options(families=_EXPERTS), point="reduce.reduced"),
        ),
    ),
    Fault(
        "norm-replicas-counted", "norm.square", "scaled", "norm-counts-replicas",
        "grad_norm only; all updates share one factor under clip", "tp > 1 and clip > 0",
        _options(factor="=tp", families=("router", "layernorm", "embedding")),
        imitates="replicated parameters counted on every lane",
        cannot=(Blind("tp == 1", "one lane counts once"),),
    ),
    Fault(
        "norm-expert-mean", "norm.square", "scaled", "norm-shards-not-combined",
        "grad_norm only", "ep > 1 and clip > 0", _options(factor="=1/ep", families=_EXPERTS),
        imitates="DeepSpeed #8475: 7.236 for 10.954",
        cannot=(Blind("ep == 1", "mean of one"),), real=True,
    ),
    Fault(
        "norm-averaged", "norm.total", "scaled", "norm-shards-not-combined",
        "grad_norm only, s = 1 / sqrt(ranks)", "world > 1", _options(factor="=world ** -0.5"),
        imitates="all-reduce of squares with AVG in the place of SUM",
    ),
    Fault(
        "norm-local", "norm.reduce", "no_collective", "norm-shards-not-combined",
        "grad_norm differs by rank; replicas of parameters drift under clip",
        "world > 1 and clip > 0", imitates="torch.nn.utils.clip_grad_norm_ on sharded parameters",
    ),
    Fault(
        "norm-gas-left", "norm.total", "scaled", "norm-scaled",
        "grad_norm only, all updates share one factor under clip", "gas > 1",
        _options(factor="=gas"), imitates="norm of the accumulation buffer before it is averaged",
        cannot=(Blind("gas == 1", "one micro-batch"),),
    ),
    Fault(
        "norm-after-clipping", "norm.total", "limited", "norm-after-clipping",
        "grad_norm only: the limit", "0 < clip < 1", _options(clip="=clip"),
        imitates="the reported norm is taken of gradients that were clipped",
        cannot=(Blind("clip == 0 or clip > 1", "nothing is clipped"),),
    ),
    Fault(
        "norm-squared", "norm.total", "squared", "norm-not-rooted",
        "grad_norm only, s = the norm", "True",
        imitates="a squared norm that nobody takes the root of",
    ),
    Fault(
        "clip-after-step", "step.order", "reversed_order", "clip-not-applied",
        "update only", "0 < clip < 1 and optimizer == 'sgd'", imitates="DeepSpeed #5150",
        cannot=(Blind("clip == 0 or clip > 1", "the coefficient is 1"),),
    ),
    Fault(
        "clip-ignored", "clip.coefficient", "replaced", "clip-not-applied",
        "update only", "0 < clip < 1 and optimizer == 'sgd'", _options(by=1.0),
        imitates="DeepSpeed #5150",
        cannot=(Blind("clip == 0 or clip > 1", "the coefficient is 1"),),
    ),
    Fault(
        "clip-scales-up", "clip.coefficient", "unbounded", "update-rule-differs",
        "update only, scale = clip", "clip > 1 and optimizer == 'sgd'",
        imitates="limit / norm without min(1, .)",
        cannot=(Blind("clip <= 1", "limit / norm is below 1 already"),),
    ),
    Fault(
        "optimizer-state-lost", "step.optimizer", "without_state", "update-rule-differs",
        "update from the second step on", "steps > 1 and optimizer != 'sgd'",
        imitates="state keyed by objects that are replaced every step",
        cannot=(Blind("steps == 1", "the first step starts without state"),),
    ),
    Fault(
        "optimizer-state-swapped", "step.optimizer", "with_swapped_state", "update-rule-differs",
        "update of parameters of one shape from the second step on",
        "steps > 1 and optimizer != 'sgd'",
        imitates="optimizer state keyed by index after the parameters were reordered",
        cannot=(Blind("steps == 1", "the first step starts without state"),),
    ),
    Fault(
        "decay-ignored", "step.optimizer", "with_options", "update-rule-differs",
        "update only", "decay > 0", _options(options={"weight_decay": 0.0}),
        imitates="parameter groups rebuilt without their options",
        cannot=(Blind("decay == 0", "0 w = 0"),),
    ),
    Fault(
        "decay-coupled", "step.optimizer", "with_options", "update-rule-differs",
        "update only", "decay > 0 and optimizer == 'adamw'",
        _options(options={"decoupled_weight_decay": False}),
        imitates="Adam where AdamW is asked for",
        cannot=(Blind("decay == 0", "g + 0 w = g"),),
    ),
    Fault(
        "betas-swapped", "step.optimizer", "with_options", "update-rule-differs",
        "update from the second step on", "steps > 1 and optimizer in ('adam', 'adamw')",
        _options(options={"betas": (0.95, 0.9)}),
        imitates="positional optimizer options in another order",
        cannot=(
            Blind(
                "steps == 1 and optimizer == 'adam'", "(1 - b) g / (1 - b^1) = g for every b",
                "False",
            ),
        ),
    ),
    Fault(
        "stale-gradient", "step.gradient", "Stale", "update-rule-differs",
        "update of the second step is that of the first", "steps > 1",
        imitates="update overlapped with the next backward without a wait",
        cannot=(Blind("steps == 1", "the first gradient is the step's own"),),
    ),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (*_RULES, *_LAYER, *_ACCUMULATION, *_BUCKETS, *_STEP)
"""Every fault, variants inside."""
BY_ID: Mapping[str, Fault] = MappingProxyType({fault.id: fault for fault in FAULTS})
