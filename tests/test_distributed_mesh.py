"""Data parallel beside graph parallel: a mesh of ranks trains as one process on all examples."""

import pytest
import torch
from distributed_mesh import (
    EXAMPLES,
    NAMES,
    on_one_process,
    on_the_mesh,
    sharded_on_the_mesh,
    sharded_over_the_graph,
    synchronized_where_sharded,
    whole_graph_gradients,
)

from fastgt.distributed import sync_gradients, sync_parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_one_process_on_all_examples(ranks, name):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(2, (20,), generator=generator) for _ in range(EXAMPLES)]
    grads, parameters = on_one_process(name, 8)
    assert grads
    answers = ranks.run(4, on_the_mesh, name, parts, 8)
    for their_grads, theirs in answers:
        assert their_grads.keys() == grads.keys()
        for key, grad in grads.items():
            assert_close(their_grads[key], grad, key)
        for key, x in parameters.items():
            assert_close(theirs[key], x, key)


def assert_close(found, wanted, key):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_sharded_over_the_examples(ranks, name):
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randint(2, (20,), generator=generator) for _ in range(EXAMPLES)]
    grads, parameters = on_one_process(name, 4)
    for their_grads, theirs in ranks.run(2 * EXAMPLES, sharded_on_the_mesh, name, parts, 4):
        assert_close(their_grads, grads, name)
        assert_close(theirs, parameters, name)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_sharded_over_the_graph(ranks, name):
    part = torch.randint(2, (20,), generator=torch.Generator().manual_seed(7))
    wanted = whole_graph_gradients(name, 4)
    for grads in ranks.run(2, sharded_over_the_graph, name, part, 4):
        assert_close(grads, wanted, name)


@pytest.mark.parametrize("function", [sync_parameters, sync_gradients])
def test_parameters_sharded_over_the_group_that_is_to_sum_them(ranks, function):
    for answer in ranks.answers(2, synchronized_where_sharded, function):
        assert answer.kind == "ValueError"
        assert "weight is sharded over ranks of the group" in answer.message
