"""What several operators obey: each law once, for any ``OpUnderTest`` and a problem of its.

The file of an operator's tests says which problems a law is tried on. Identities between two runs
are judged in float64, where a wrong formula cannot hide, unless equal bits are what a law says.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import FP32, FP64, all_close, arrange, close, same_bits
from problems import DEVICE, GraphProblem, OpUnderTest, Results, joined
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgt.prepared import Prepared
from fastgt.testing import assert_as_accurate, with_index_dtype


def equals_its_oracle(op: OpUnderTest, impl: str, x: Any) -> None:
    """Outputs and gradients are those of the equations, in loops."""
    all_close(op.evaluate(x, impl), op.oracle(x), op.tolerance)


def as_accurate_as_eager(
    op: OpUnderTest,
    impl: str,
    x: Any,
    *,
    of_outputs: float = 2.0,
    but: Iterable[str] = (),
    terms: Results | None = None,
) -> None:
    """Outputs err at most twice as much as plain PyTorch in the same dtype, gradients thrice.

    In float64 plain PyTorch is the oracle itself: there the loops are the judge.

    Args:
        but: Results that are not judged.
        terms: Sizes of what results are the differences of, as ``assert_as_accurate`` takes them.
    """
    sizes = terms or {}
    truth = op.evaluate(x, "reference", FP64)
    actual, eager = op.evaluate(x, impl), op.evaluate(x, "reference")
    assert actual.keys() == eager.keys() >= set(but)
    for name in actual.keys() - set(but):
        factor = 3.0 if name.startswith("d") else of_outputs
        assert_as_accurate(actual[name], eager[name], truth[name], name, factor, sizes.get(name))


def half_precision_only_rounds(
    op: OpUnderTest, impl: str, x: GraphProblem, *, but: Iterable[str] = ()
) -> None:
    """Sums are kept in float32: a hub row must not drown in bfloat16."""
    half, full = op.evaluate(x, impl), op.evaluate(x, impl, FP32)
    (dtype,) = {t.dtype for name, t in half.items() if name != "lse"}
    assert dtype == x.tensors()["do"].dtype
    step = torch.finfo(dtype).eps
    if "lse" in half:
        assert half["lse"].dtype == FP32
        close(half["lse"], full["lse"], "lse", 1e-6)
    for name in half.keys() - {"lse", *but}:
        expected = full[name].to(dtype)
        torch.testing.assert_close(half[name], expected, rtol=step, atol=step * 0.01, msg=name)


def renumbering_nodes_renumbers_the_result(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """f(P x) = P f(x) for every permutation P of the nodes; edge tensors stay as they are."""
    order = torch.randperm(x.graph.num_rows, generator=x.generator).to(DEVICE)
    found = op.evaluate(x.renumbered(order), impl)
    for name, y in op.evaluate(x, impl).items():
        close(found[name], y[order] if x.over(name) in ("rows", "cols") else y, name)


def reordering_edges_reorders_only_edge_tensors(
    op: OpUnderTest, impl: str, x: GraphProblem
) -> None:
    """f(P e) = P f(e) for every permutation P of the edges; what nodes have stays as it is."""
    order = torch.randperm(x.graph.num_edges, generator=x.generator).to(DEVICE)
    found = op.evaluate(x.taking(order), impl)
    for name, y in op.evaluate(x, impl).items():
        close(found[name], y[order] if x.over(name) == "edges" else y, name)


def a_duplicate_edge_adds_log_2_to_its_logits(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """exp(s) + exp(s) = exp(s + log 2); what the two edges have adds up to what the one has."""
    every = torch.arange(x.graph.num_edges, device=DEVICE)
    twice = torch.rand(len(every), generator=x.generator).to(DEVICE) < 0.5
    doubled = op.evaluate(x.taking(torch.cat([every, every[twice]])), impl)
    logit = x.tensors()[op.logit]
    found = op.evaluate(x.having(**{op.logit: logit + math.log(2) * along(twice, logit)}), impl)
    for name, y in doubled.items():
        if x.over(name) == "edges":
            single = y[: len(every)]
            single[twice] += y[len(every) :]
            y = single
        close(y, found[name], name)


def along(mask: Tensor, like: Tensor) -> Tensor:
    """A number for each first index, for products with a tensor of more dimensions."""
    return mask.to(like).view(-1, *[1] * (like.ndim - 1))


def rows_without_edges_give_zero(op: OpUnderTest, impl: str, x: GraphProblem) -> Results:
    """Their outputs are 0, their LSE is -inf; a gradient of a node without edges is 0."""
    found, none = op.evaluate(x, impl), {"rows": x.isolated(), "cols": x.unused()}
    for name, y in found.items():
        assert not y.isnan().any(), name
        if x.over(name) in none:
            assert (y[none[x.over(name)]] == (-torch.inf if name == "lse" else 0)).all(), name
    return found


def without_edges_all_is_zero(op: OpUnderTest, impl: str, x: GraphProblem) -> Results:
    """On a graph without edges, of any number of rows and columns; each LSE is -inf."""
    found = op.evaluate(x, impl)
    for name, y in found.items():
        assert (y == (-torch.inf if name == "lse" else 0)).all(), name
        assert x.over(name) == "none" or len(y) == x.sizes[x.over(name)], name
    return found


def a_batch_is_its_graphs_one_by_one(
    op: OpUnderTest, impl: str, parts: list, spoilt: int, spreads: Iterable[str] = ("o",)
) -> None:
    """One neighbour full of NaN changes nothing; in that one, ``spreads`` are NaN where those of
    the plain definition are."""
    for tensor in parts[spoilt].tensors().values():
        tensor.fill_(torch.nan)
    assert all(tensor.isnan().all() for tensor in parts[spoilt].tensors().values())
    whole = op.evaluate(joined(parts), impl)
    for i, x in enumerate(parts):
        alone = op.evaluate(x, "reference" if i == spoilt else impl)
        for name, y in whole.items():
            mine = y.split([part.sizes[x.over(name)] for part in parts])[i]
            if i != spoilt:
                close(mine, alone[name], name)
            elif name in spreads:
                assert torch.equal(mine.isnan(), alone[name].isnan()), name


def a_row_depends_on_its_neighbourhood_only(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """A row's output has no gradient to other rows, columns it has no edge from, others' edges."""
    n = x.graph.num_rows
    if n == 0:
        return
    row = int(torch.randint(n, (1,), generator=x.generator))
    within = of_rows(x, torch.arange(n, device=DEVICE) == row)
    upstream = {
        name: t * along(within[x.over(name)], t)
        for name, t in x.tensors().items()
        if name.startswith("d")
    }
    for name, y in op.evaluate(x.having(**upstream), impl).items():
        if name.startswith("d") and x.over(name) != "none":
            assert (y[~within[x.over(name)]] == 0).all(), name


def of_rows(x: GraphProblem, rows: Tensor) -> dict[str, Tensor]:
    """These rows, the columns that they have edges from, and these edges, as masks."""
    edges = rows[x.target]
    cols = torch.zeros(x.graph.num_cols, dtype=torch.bool, device=DEVICE)
    cols[x.source[edges]] = True
    return {"rows": rows, "cols": cols, "edges": edges}


def a_value_stays_with_its_rows(
    op: OpUnderTest,
    impl: str,
    x: GraphProblem,
    where: str,
    value: float,
    *,
    channel: int | None = None,
    tolerance: float = 0.0,
) -> tuple[Results, dict[str, Tensor]]:
    """NaN or infinity in one entry of a tensor changes the rows that read it, and what has edges
    to these rows.

    Args:
        channel: The one that is changed, of tensors [..., C] whose channels are apart; else all.
        tolerance: 0: not a bit of the rest changes.

    Returns:
        The results, and which rows, columns and edges may have changed.
    """
    over = x.over(where)
    at = {"rows": int(x.target[0]), "cols": int(x.source[0]), "edges": 0}[over]
    edges = {"rows": x.target == at, "cols": x.source == at, "edges": [0]}[over]
    rows = torch.zeros(x.graph.num_rows, dtype=torch.bool, device=DEVICE)
    rows[x.target[edges]] = True
    hit = of_rows(x, rows)
    assert not rows.all()
    tensor = x.tensors()[where].clone()
    tensor[at if channel is None else (at, channel)] = value
    found, clean = op.evaluate(x.having(**{where: tensor}), impl), op.evaluate(x, impl)
    for name, y in found.items():
        if x.over(name) == "none":  # a sum over all edges
            continue
        left = ~hit[x.over(name)]
        if channel is not None:
            left = left[:, None] | (torch.arange(y.shape[1], device=DEVICE) != channel)
        if tolerance:
            close(y[left], clean[name][left], name, tolerance)
        else:
            assert torch.equal(y[left], clean[name][left]), (where, name)
    return found, hit


def weights_sum_to_one(op: OpUnderTest, impl: str, x: GraphProblem, value: Tensor) -> None:
    """The output is the weights' mean of ``value``, [E, ...], and lies between its extremes."""
    found, used = op.evaluate(x, impl), ~x.isolated()
    weights, o = found["weights"], found["o"]
    mass = torch.zeros_like(found["lse"]).index_add(0, x.target, weights)
    close(mass, along(used, mass).expand_as(mass))
    weights = weights if weights.ndim == value.ndim else weights[..., None]
    close(o, torch.zeros_like(o).index_add(0, x.target, weights * value))
    index = x.target.view(-1, *[1] * (value.ndim - 1)).expand_as(value)
    for pick, sign in (("amin", 1), ("amax", -1)):
        edge = torch.zeros_like(o).scatter_reduce(0, index, value, pick, include_self=False)
        assert (sign * (o - edge) >= -1e-12).all()


def constant_values_give_no_gradient_to_logits(
    op: OpUnderTest, impl: str, x: GraphProblem, bounds: dict[str, float]
) -> None:
    """However large the logits, whose rounding makes the recomputed weights miss 1.

    ``bounds``: the largest gradients that rounding in the dtype may leave.
    """
    v = x.tensors()["v"]
    x = x.having(v=v[:1].expand_as(v), dlse=torch.zeros_like(x.tensors()["dlse"]))
    found, used = op.evaluate(x, impl), ~x.isolated()
    o = found["o"][used]
    close(o, v[:1].expand_as(o), "o", 8 * torch.finfo(v.dtype).eps)
    for name, bound in bounds.items():
        assert found[name].abs().max() <= bound, name


def a_rounded_output_does_not_shift_the_gradient(
    op: OpUnderTest, impl: str, x: GraphProblem, names: Iterable[str]
) -> None:
    """Values far from 0 that differ little: the output is rounded as coarsely as they differ."""
    truth, found = op.evaluate(x, "reference", FP64), op.evaluate(x, impl)
    for name in names:
        error, size = (found[name] - truth[name]).abs().max(), truth[name].abs().max()
        assert error < 0.02 * size, (name, float(error / size))


def a_constant_added_to_a_rows_logits_changes_only_the_lse(
    op: OpUnderTest, impl: str, x: GraphProblem
) -> None:
    """exp(s + c) / sum exp(s + c) = exp(s) / sum exp(s), for another c in every row."""
    logit = x.tensors()[op.logit]
    shape = x.graph.num_rows, *logit.shape[1:]
    shift = torch.randn(shape, generator=x.generator, dtype=FP64).to(DEVICE) * 20
    moved = op.evaluate(x.having(**{op.logit: logit + shift[x.target]}), impl)
    plain = op.evaluate(x, impl)
    if "lse" in plain:
        plain["lse"] = plain["lse"] + shift
    all_close(moved, plain)


def a_single_edge_copies_its_value(
    op: OpUnderTest, impl: str, x: GraphProblem, value: Tensor
) -> None:
    """Its weight is 1, whatever its logit; ``value`` is that of every column."""
    n = x.graph.num_rows
    order = torch.randperm(n, generator=x.generator).to(DEVICE)
    found = op.results(x.onto(torch.stack([order, torch.arange(n, device=DEVICE)])), impl)
    assert torch.equal(found["o"], value[order])
    assert (found["weights"] == 1).all()


def partitions_of_the_edges_merge_through_the_lse(
    op: OpUnderTest, impl: str, x: GraphProblem
) -> None:
    """o = sum_p softmax_p(lse_p) o_p and lse = logsumexp_p lse_p, as partial results on several
    devices are merged; values and gradients."""
    part = torch.randint(3, (x.graph.num_edges,), generator=x.generator).to(DEVICE) == 0
    whole = op.evaluate(x, impl)
    y, leaves = x.leaves()
    pieces = [op.results(y.taking(some.nonzero().flatten()), impl) for some in (part, ~part)]
    o, lse = (torch.stack([piece[name] for piece in pieces]) for name in ("o", "lse"))
    none = lse == -torch.inf
    finite = lse.masked_fill(none, -1e5)  # blocks the gradient where there is nothing to merge
    total = finite.logsumexp(0).masked_fill(none.all(0), -torch.inf)
    share = finite.softmax(0)
    merged = ((share if o.ndim == share.ndim else share[..., None]) * o).sum(0)
    upstream = x.tensors()["do"], x.tensors()["dlse"]
    grads = torch.autograd.grad(
        (merged, total), list(leaves.values()), upstream, materialize_grads=True
    )
    found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    for name, t in ({"o": merged, "lse": total} | found).items():
        close(t, whole[name], name)


def huge_logits_leave_no_nan(
    op: OpUnderTest, impl: str, x: GraphProblem, *, of_outputs: float = 2.0
) -> None:
    """And cost no accuracy."""
    for name, y in op.evaluate(x, impl).items():
        assert not y.isnan().any(), name
    as_accurate_as_eager(op, impl, x, of_outputs=of_outputs)


def edges_of_minus_infinity_do_not_exist(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """Single ones, one head or channel of row 5, and all of row 2, which is then as a row without
    edges. ``x``: two heads or channels, of rows that all have edges."""
    logit = x.tensors()[op.logit]
    gone = torch.rand(logit.shape, generator=x.generator).to(DEVICE) < 0.3
    gone[x.target == 2] = True
    gone[x.target == 5, 1] = True
    found = op.evaluate(x.having(**{op.logit: logit.masked_fill(gone, -torch.inf)}), impl)
    for name, y in found.items():
        assert not y.isnan().any(), name
        if x.over(name) == "edges":
            assert (y[gone] == 0).all(), name
        elif x.over(name) == "rows":
            assert (y[2] == (-torch.inf if name == "lse" else 0)).all(), name
    assert (found["o"][5, 1] == 0).all()
    if logit.dtype != FP64:
        return
    for channel in range(2):
        left = ~gone[:, channel]
        for name, y in op.evaluate(x.taking(left), impl).items():
            mine = found[name][left] if x.over(name) == "edges" else found[name]
            close(mine[:, channel], y[:, channel], name)


def clamps(op: OpUnderTest, impl: str, x: Any, clamp: float | tuple[float, float]) -> None:
    """A number stands for both bounds; a bound may be infinite, and both may be equal."""
    both = clamp if isinstance(clamp, tuple) else (-clamp, clamp)
    found = op.evaluate(replace(x, options=x.options | {"logit_clamp": clamp}), impl)
    all_close(found, op.oracle(replace(x, options=x.options | {"logit_clamp": both})))


def eps_is_added_to_the_sum_of_the_plain_exponentials(op: OpUnderTest, impl: str, x: Any) -> None:
    """o (Z + eps) = sum exp(s) v and Z = exp(lse), however eps compares with Z."""
    eps = x.options["denominator_eps"]
    found = op.results(x, impl)
    bare = op.results(replace(x, options=x.options | {"denominator_eps": 0.0}), impl)
    share = bare["lse"].exp() / (bare["lse"].exp() + eps)
    close(found["lse"], bare["lse"])
    close(found["weights"], bare["weights"] * share[x.target])
    close(found["o"], bare["o"] * (share if share.ndim == bare["o"].ndim else share[..., None]))


def every_subset_of_gradients(
    op: OpUnderTest,
    impl: str,
    x: GraphProblem,
    outputs: Iterable[str],
    *,
    twice: bool,
    skip: Iterable[int] = (),
    connected: bool = True,
) -> None:
    """Asked for alone or together, through these outputs only: always the same.

    Args:
        twice: With a graph for second derivatives.
        skip: So many gradients at once are not asked for.
        connected: Every output of an implementation depends on every input. In the reference, plain
            autograd knows better.
    """
    strict = connected and impl != "reference"
    given = x.tensors()
    unused = {n: given[n] * 0 for n in given if n.startswith("d") and n[1:] not in outputs}
    expected = op.oracle(x.having(**unused))
    names = [name for name in given if not name.startswith("d")]
    for wanted in itertools.product([False, True], repeat=len(names)):
        if not any(wanted) or sum(wanted) in skip:
            continue
        y, leaves = x.leaves(set(itertools.compress(names, wanted)))
        inputs = {name: t for name, t in leaves.items() if t.requires_grad}
        results = op.results(y, impl)
        pairs = [
            (results[n], given[f"d{n}"]) for n in outputs if strict or results[n].requires_grad
        ]
        if not pairs:
            continue
        ys, dys = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            ys, list(inputs.values()), dys, create_graph=twice, materialize_grads=not strict
        )
        for name, grad in zip(inputs, found, strict=True):
            close(grad, expected[f"d{name}"], f"d{name} of {list(inputs)}")


def double_backward_equals_the_reference(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """First and second derivatives of all outputs, by all inputs and the upstream gradient."""

    def both(impl: str) -> list[Tensor]:
        y, leaves = x.leaves()
        given = x.tensors()
        do = given["do"].detach().clone().requires_grad_()
        upstream = given | {"do": do}
        loss = torch.zeros((), dtype=FP64, device=DEVICE)
        for name, t in op.results(y, impl).items():
            if f"d{name}" in upstream:
                finite = t.isfinite()  # the LSE of a row without edges is not
                loss = loss + (t * upstream[f"d{name}"] + t.square())[finite].sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(loss, [*leaves.values(), do])]

    for a, b in zip(both(impl), both("reference"), strict=True):
        close(a, b)


def gradients_through_one_tensor_equal_the_reference(
    f: Callable[..., Tensor], impl: str, start: Tensor
) -> None:
    """First and second derivatives of ``f(start, impl=impl)``, whose inputs are all made of it."""
    found = []
    for chosen in (impl, "reference"):
        leaf = start.clone().requires_grad_()
        o = f(leaf, impl=chosen)
        first = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.cos().sum(), leaf)[0]))
    for a, b in zip(*found, strict=True):
        close(a, b)


def forward_mode_is_refused_not_zero(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """The reference has it, and gives what double backward gives."""
    name, start = next(iter(x.tensors().items()))

    def f(t: Tensor, impl: str = impl) -> Tensor:
        return op.results(x.having(**{name: t}), impl)["o"]

    direction = start.cos()
    tangent = torch.func.jvp(lambda t: f(t, "reference"), (start,), (direction,))[1]
    close(tangent, torch.autograd.functional.jvp(f, start, direction)[1])
    with pytest.raises(NotImplementedError, match="impl='reference' only"):
        torch.func.jvp(f, (start,), (direction,))


def the_same_bits_every_time(op: OpUnderTest, impl: str, x: Any, times: int) -> None:
    """No atomics, no order of sums that chance decides."""
    first = op.evaluate(x, impl)
    for _ in range(times):
        same_bits(op.evaluate(x, impl), first)


def index_width_does_not_change_a_bit(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """A graph beyond 2^31 has indices of 64 bits."""
    wide = replace(x, graph=with_index_dtype(x.graph, torch.int64))
    assert wide.graph.columns.slot.dtype == torch.int64
    same_bits(op.evaluate(wide, impl), op.evaluate(x, impl))


def threads_do_not_change_a_bit(op: OpUnderTest, x: Any) -> None:
    """Of the CPU path: how rows are shared out decides no order of sums."""
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            found.append(op.evaluate(x, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        same_bits(results, found[0])


def strides_do_not_change_a_bit(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """``x``, whose tensors are laid out in any way, gives what contiguous copies give."""
    plain = x.having(**{name: t.contiguous() for name, t in x.tensors().items()})
    same_bits(op.evaluate(x, impl), op.evaluate(plain, impl))


def one_tensor_in_other_strides_does_not_change_a_bit(
    op: OpUnderTest, impl: str, x: GraphProblem, layouts: Iterable[str]
) -> None:
    """Amid aligned ones: the kernels' vector loads rely on what all of them have in common."""
    plain = op.evaluate(x, impl)
    for layout in layouts:
        for name, tensor in x.tensors().items():
            same_bits(op.evaluate(x.having(**{name: arrange(tensor, layout)}), impl), plain)


def laid(x: Any, layout: str) -> Any:
    """The same problem with all its tensors in other strides."""
    return x.having(**{name: arrange(t, layout) for name, t in x.tensors().items()})


def with_upstream(x: Any, layout: str) -> Any:
    """The same problem whose upstream gradients are in other strides; "scalar": all are one 1."""
    one = torch.ones((), device=DEVICE)
    upstream = {
        name: one.to(t).expand(t.shape) if layout == "scalar" else arrange(t, layout)
        for name, t in x.tensors().items()
        if name.startswith("d")
    }
    return x.having(**upstream)


def inputs_are_left_alone_and_outputs_alias_nothing(
    op: OpUnderTest, impl: str, x: GraphProblem
) -> None:
    """Neither the tensors nor the graph change, and no result shares memory."""
    walks = [x.graph.row_ptr, x.graph.col, x.graph.edge, *x.graph.columns]
    inputs = [*x.tensors().values(), *walks]
    before = [t.clone() for t in inputs]
    found = op.evaluate(x, impl)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)
    places = [t.untyped_storage().data_ptr() for t in (*inputs, *found.values())]
    assert len(set(places)) == len(places)


def checkpointing_changes_no_gradient(
    op: OpUnderTest, impl: str, x: GraphProblem, *, reentrant: bool
) -> None:
    """Computed once more in the backward, the same bits come out."""
    _, leaves = x.leaves()
    names, do = list(leaves), x.tensors()["do"]

    def f(*inputs: Tensor) -> Tensor:
        given = {name: t.tanh() for name, t in zip(names, inputs, strict=True)}
        return op.results(x.having(**given), impl)["o"]

    checkpoint(f, *leaves.values(), use_reentrant=reentrant).backward(do)
    plain = torch.autograd.grad(f(*leaves.values()), list(leaves.values()), do)
    for leaf, grad in zip(leaves.values(), plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def inference_never_sorts_the_column_walk(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """Only a backward needs it, and nothing else is prepared either."""
    op.results(x, impl)
    with torch.no_grad():
        op.results(x.leaves()[0], impl)
    assert vars(x.graph.prepared) == vars(Prepared())


def autocast_casts_the_inputs(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """To bfloat16 from float32, and not from float64; gradients come back in float32."""
    bf16, do = torch.bfloat16, x.tensors()["do"].to(torch.bfloat16)
    y, leaves = x.leaves()
    with torch.autocast(DEVICE, bf16):
        o = op.results(y, impl)["o"]
    z, cast = x.having(**{name: t.detach().to(bf16) for name, t in leaves.items()}).leaves()
    plain = op.results(z, impl)["o"]
    assert o.dtype == bf16
    assert torch.equal(o, plain)
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    for a, b in zip(grads, torch.autograd.grad(plain, list(cast.values()), do), strict=True):
        assert a.dtype == FP32
        assert torch.equal(a, b.float())
    wide = x.having(**{name: t.detach().double() for name, t in leaves.items()})
    with torch.autocast(DEVICE, bf16):
        assert op.results(wide, impl)["o"].dtype == FP64


def autocast_casts_the_other_half_too(op: OpUnderTest, impl: str, x: GraphProblem) -> None:
    """``x`` is in float16, autocast in bfloat16."""
    with torch.autocast(DEVICE, torch.bfloat16):
        o = op.results(x, impl)["o"]
    cast = {name: t.to(torch.bfloat16) for name, t in x.leaves()[1].items()}
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, op.results(x.having(**cast), impl)["o"])
