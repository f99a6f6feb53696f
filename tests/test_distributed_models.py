"""Models on a DistributedGraph learn what they learn in one process, with dropout too."""

import functools

import pytest
import torch
from distributed_models import (
    MODELS,
    compiled_by_some,
    computed_again,
    copied,
    graph_of,
    normed,
    step,
    widths_sent,
)

from fastgt.distributed import Group


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_learn_what_one_process_learns(ranks, name, parts):
    graph = graph_of(parts)
    one = torch.zeros(graph.num_rows, dtype=torch.int64)
    _, _, outputs, grads, state = step(Group(), name, graph, one, 5)
    # rank 1 has no rows where there are four
    part = torch.randint(parts, one.shape, generator=torch.Generator().manual_seed(parts))
    part[part == 1] = 0 if parts == 4 else 1
    answers = ranks.run(parts, step, name, graph, part, 5)
    for rows, kind, theirs, their_grads, their_state in answers:
        for mine, out in zip(outputs, theirs, strict=True):
            assert_close(out, mine[rows] if kind == "row" else mine)
        assert their_grads.keys() == grads.keys()
        for key, grad in grads.items():
            assert_close(their_grads[key], grad, key)
        for key, value in state.items():
            assert_close(their_state[key], value, key)


@pytest.mark.parametrize("shape", [(20, 4), (20, 4, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_a_batch_norm_is_that_of_all_rows(ranks, shape, training, tracks):
    graph, part = graph_of(1), torch.arange(20) // 13
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    args = x, training, {"track_running_stats": tracks}
    wanted = torch.nn.BatchNorm1d(4, track_running_stats=tracks).double().train(training)
    leaf = x.clone().requires_grad_()
    out = wanted(leaf)
    (grad,) = torch.autograd.grad(out.tanh().sum(), leaf)
    for rows, theirs, their_grad, state in ranks.run(2, normed, graph, part, *args):
        assert_close(theirs, out[rows])
        assert_close(their_grad, grad[rows])
        for key, value in wanted.named_buffers():
            assert_close(state[f"norm.{key}"], value, key)


def assert_close(found, wanted, key=""):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("compiling", [[1], [0, 1]])
def test_ranks_that_compile_wait_for_those_that_do_not(ranks, compiling):
    graph, part = graph_of(1), torch.arange(20) // 13
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for compiled, eager in ranks.run(2, compiled_by_some, graph, part, x, compiling):
        assert any(grad.abs().max() > 0.1 for grad in eager)
        for a, b in zip(compiled, eager, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_are_computed_again_in_the_backward(ranks, use_reentrant):
    graph, part = graph_of(1), torch.arange(20) // 13
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    run = functools.partial(computed_again, use_reentrant=use_reentrant)
    for again, once in ranks.run(2, run, graph, part, x):
        assert all(grad.abs().max() > 0.01 for grad in (once[0], once[1]))
        for a, b in zip(again, once, strict=True):
            assert_close(a, b)


def test_copies_of_a_model_that_ran_on_ranks(ranks):
    graph, part = graph_of(1), torch.arange(20) // 13
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for wanted, deep, unpickled in ranks.run(2, copied, graph, part, x):
        assert torch.equal(deep, wanted)
        assert torch.equal(unpickled, wanted)


def test_the_same_bits_every_time(ranks):
    graph, part = graph_of(1), torch.arange(20) % 3
    first = ranks.run(3, step, "GraphGPS with softmax", graph, part, 2)
    again = ranks.run(3, step, "GraphGPS with softmax", graph, part, 2)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
        assert all(torch.equal(x, b[3][key]) for key, x in a[3].items())


@pytest.mark.parametrize(("context_dim", "width"), [(6, 6), (40, 16)])
def test_a_module_sends_its_context_or_keys_and_values_whichever_is_less(ranks, context_dim, width):
    assert ranks.run(2, widths_sent, 8, context_dim) == [[width, width]] * 2
