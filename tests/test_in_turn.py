"""in_turn: ranks that take turns in one process compute what processes compute, in less memory."""

import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import turn_cases
from distributed_models import graph_of, step

from fastgt import Graph
from fastgt.distributed import (
    DistributedGraph,
    Group,
    file_memory,
    in_turn,
    partition,
    write_partitions,
)
from fastgt.distributed.file_memory import FileMemory
from fastgt.shard import Roles


@pytest.mark.parametrize("name", ["GraphTransformer", "SGFormer", "GraphGPS with softmax"])
def test_ranks_in_turn_learn_what_processes_and_one_process_learn(
    ranks, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(file_memory, "LEAST", 1)  # everything is in files
    graph = graph_of(3)
    one = torch.zeros(graph.num_rows, dtype=torch.int64)
    part = torch.randint(3, one.shape, generator=torch.Generator().manual_seed(3))
    part[part == 1] = 2  # a rank without rows
    _, _, outputs, grads, state = step(Group(), name, graph, one, 5)
    processes = ranks.run(3, step, name, graph, part, 5)
    turns = in_turn(step, 3, tmp_path, name, graph, part, 5)
    for of_turn, of_process in zip(turns, processes, strict=True):
        rows, kind, theirs, their_grads, their_state = of_turn
        assert torch.equal(rows, of_process[0])
        for out, mine, processed in zip(theirs, outputs, of_process[2], strict=True):
            assert_close(out, mine[rows] if kind == "row" else mine)
            assert_close(out, processed)
        assert their_grads.keys() == grads.keys() == of_process[3].keys()
        for key, grad in their_grads.items():
            assert_close(grad, grads[key], key)
            assert_close(grad, of_process[3][key], key)
        for key, value in their_state.items():
            assert_close(value, state[key], key)
    assert not list(tmp_path.iterdir())


def assert_close(found, wanted, key=""):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_collectives_are_those_of_processes(ranks, tmp_path, parts):
    wanted = ranks.run(parts, turn_cases.collectives)
    for (found, told), (theirs, said) in zip(
        in_turn(turn_cases.collectives, parts, tmp_path), wanted, strict=True
    ):
        assert told == said
        assert found.keys() == theirs.keys()
        for key, x in found.items():
            assert x.dtype == theirs[key].dtype
            assert torch.equal(x, theirs[key]), key


def test_every_rank_has_the_generator_to_itself(tmp_path):
    def drawn(group):
        first = torch.rand(3)
        group.sum(torch.ones(2))  # others have their turns
        return torch.cat([first, torch.rand(2), torch.randn(group.rank)])

    torch.manual_seed(4)
    wanted = drawn(Group())
    after = torch.get_rng_state()
    torch.manual_seed(4)
    for rank, found in enumerate(in_turn(drawn, 3, tmp_path)):
        assert torch.equal(found[:5], wanted)
        assert len(found) == 5 + rank
    assert torch.equal(torch.get_rng_state(), after)  # as rank 0 left it


def test_one_rank_runs_at_a_time_in_the_same_order_every_time(tmp_path):
    def watched(group, log, running):
        for number in range(4):
            running.append(group.rank)
            log.append((group.rank, number, len(running)))
            time.sleep(random.random() / 500)
            running.remove(group.rank)
            group.sum(torch.ones(1))

    logs = [[], []]
    for log in logs:
        in_turn(watched, 3, tmp_path, log, [])
    assert logs[0] == logs[1]
    assert {running for _, _, running in logs[0]} == {1}
    assert len(logs[0]) == 12


def test_what_is_computed_while_rows_fly_is_no_turn_of_others(tmp_path):
    """A rank that has sent goes on until it needs what the others send."""

    def sends(group, log):
        counts = [1] * group.size
        flight = group.all_to_all(torch.full((2, 1), float(group.rank)), counts, counts)
        log.append((group.rank, "sent"))
        log.append((group.rank, "computed"))
        found = flight.wait()
        log.append((group.rank, "received"))
        assert flight.wait() is found
        return found.flatten().tolist()

    log = []
    assert in_turn(sends, 2, tmp_path, log) == [[0.0, 1.0]] * 2
    assert log[:4] == [(0, "sent"), (0, "computed"), (1, "sent"), (1, "computed")]


def ends(group, how):
    group.sum(torch.ones(1))
    if how == "raises" and group.rank == 1:
        raise ValueError("no such thing")
    if how == "ends" and group.rank == 2:
        return
    if how == "another" and group.rank == 1:
        group.gathered(torch.ones(1))
    if how == "shape" and group.rank == 1:
        group.sum(torch.ones(2))
    if how == "rows":
        counts = [1, 1, 1]
        group.all_to_all(torch.ones(3, 1), counts, [1, 1, 2 if group.rank else 1]).wait()
    if how == "size":
        graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        shard = DistributedGraph.from_graph(graph, torch.arange(3), group)
        shard.check_call(ends, Roles(rows=("x",)), {"x": torch.ones(2 if group.rank == 1 else 1)})
    group.sum(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "rank 1 of 3: ValueError: no such thing"),
        ("ends", "rank 0 is in sum of torch.float32[1], and rank 2 ended without it"),
        ("another", "rank 1 is in gathered of torch.float32[1] where rank 2 is in sum of"),
        ("shape", "rank 1 is in sum of torch.float32[2] where rank 2 is in sum of torch.float32"),
        ("rows", "expects 2 rows of rank 2, which sent 1"),
        ("size", "x is [2] but rank 1 has 1 rows"),
    ],
)
def test_where_one_rank_fails_all_end_with_its_message(tmp_path, how, said):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=re.escape(said)) as raised:
        in_turn(ends, 3, tmp_path, how)
    assert isinstance(raised.value.__cause__, (ValueError, RuntimeError))
    assert threading.active_count() == before


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="function must be callable, got int"):
        in_turn(3, 2, tmp_path)
    with pytest.raises(ValueError, match="parts must be from 1 to"):
        in_turn(turn_cases.collectives, 0, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        in_turn(turn_cases.collectives, 2, tmp_path / "file")


def in_file(x):
    return not x.untyped_storage().resizable()


def test_large_results_are_in_files_forward_and_backward(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 150, generator=generator, requires_grad=True)
    wanted = torch.autograd.grad((x.T.exp() @ x).square().sum(), x)[0]
    kept = []
    with FileMemory(tmp_path) as memory:
        y = x.T.exp()
        assert in_file(y)
        assert y.stride() == x.T.exp().stride() == (1, 150)
        assert not in_file(x)
        small = torch.zeros(100)
        assert not in_file(small)
        z = (y @ x).square()
        z.sum().backward()
        kept = [y.detach(), x.grad]
        view, place = y.detach()[3:], y.data_ptr()
        assert view.data_ptr() == place + 3 * y.stride(0) * 4
        assert y.detach().add_(1).data_ptr() == place
        assert in_file(x.grad)
        for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.int64):
            typed = x.detach().to(dtype).repeat(4, 1)
            assert in_file(typed)
            assert torch.equal(typed, x.detach().to(dtype).repeat(4, 1))
        memory.put_away()
        assert torch.equal(x.grad, wanted)
        assert torch.equal(kept[0], x.detach().T.exp() + 1)
    assert not list(tmp_path.iterdir())
    x.grad = None
    del y, z, kept, view, typed
    memory.put_away()
    assert not memory._mapped


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="measured as Linux accounts for it"
)
def test_memory_is_that_of_a_part(tmp_path):
    nodes, layers = 40_000, 4
    here = torch.arange(nodes)
    ends = torch.stack([torch.cat([here, here]), torch.cat([here.roll(1), here.roll(-7)])])
    graph = Graph.from_edge_index(ends, nodes)
    types = torch.randint(3, (nodes,), generator=torch.Generator().manual_seed(0))
    measured = {}
    for parts in (1, 8):
        folder = tmp_path / f"{parts}"
        write_partitions(folder, graph, partition(graph, parts, "contiguous"), node_type=types)
        command = [sys.executable, turn_cases.__file__, folder, parts, layers, tmp_path / "files"]
        run = subprocess.run(
            [str(x) for x in command],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(turn_cases.__file__).parent)},
        )
        assert not run.returncode, run.stderr
        measured[parts] = [float(x) for x in run.stdout.split()]
    (whole, *losses), (part, *losses_in_turn) = measured[1], measured[8]
    assert losses_in_turn == pytest.approx(losses, rel=1e-4)
    assert part < whole / 2, f"{part / 1e6:.0f} of {whole / 1e6:.0f} MB"
