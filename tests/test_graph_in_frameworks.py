"""Graph: what frameworks do to a batch that holds one: move, pin, share, convert, rebuild."""

import copy
import dataclasses
from abc import ABC
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import SIX, assert_same, tensors_of
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel.distributed import _tree_flatten_with_rref, _tree_unflatten_with_rref
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from fastgt import Graph, neighborhood_attention

PTR = torch.tensor([0, 4, 6])


def walked() -> Graph:
    """A batch of two graphs that holds all that a graph may hold."""
    graph = Graph.from_edge_index(SIX, 6, graph_ptr=PTR).reordered(torch.tensor([1, 0, 2, 3, 5, 4]))
    graph.plan("windows")
    return graph


def held(graph: Graph) -> list[torch.Tensor]:
    tensors = graph._tensors()
    assert len(tensors) >= 20  # the tables of both windows too
    return tensors


def pyg_data(graph: Graph) -> Any:
    data = pytest.importorskip("torch_geometric.data")
    return data.Data(x=torch.randn(6, 8), edge_index=SIX.clone(), graph=graph)


@pytest.mark.parametrize(
    "move",
    [
        lambda data: data.to("meta"),
        lambda data: data.to("meta", non_blocking=True),
        lambda data: data.to(torch.device("meta"), "x", "graph"),
    ],
    ids=["to", "non_blocking", "some attributes"],
)
def test_a_graph_in_pyg_data_moves_with_it(move: Callable[[Any], Any]) -> None:
    data = pyg_data(walked())
    moved = move(data)
    assert moved.x.device.type == "meta"
    assert {x.device.type for x in held(moved.graph)} == {"meta"}
    assert moved.graph.graph_ptr is moved.graph.col_graph_ptr


def test_pyg_moves_a_graph_to_the_cpu_and_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        Graph, "to", lambda self, device, **options: asked.append((str(device), options)) or self
    )
    data = pytest.importorskip("torch_geometric.data").Data(graph=walked())
    data.cpu()
    data.cuda(non_blocking=True)
    data.cuda("cuda:1")
    assert asked == [
        ("cpu", {}),
        ("cuda", {"non_blocking": True}),
        ("cuda:1", {"non_blocking": False}),
    ]


def test_graphs_in_a_pyg_batch_stay_graphs() -> None:
    loader = pytest.importorskip("torch_geometric.loader").DataLoader
    graph = Graph.from_edge_index(SIX, 6)
    (batch,) = loader([pyg_data(graph), pyg_data(graph)], batch_size=2)
    assert_same(Graph.batch(batch.graph), Graph.from_pyg(batch))
    assert {g.device.type for g in batch.to("meta").graph} == {"meta"}


@pytest.mark.parametrize("name", ["half", "bfloat16", "double", "float", "contiguous", "detach"])
def test_conversions_leave_indices_alone(name: str) -> None:
    data = pyg_data(walked())
    before = copy.deepcopy(data.graph)
    converted = data.apply(lambda x: getattr(x, name)() if x is not data.edge_index else x)
    assert_same(converted.graph, before)

    layer = torch.nn.Linear(4, 4)
    layer.graph = data.graph
    getattr(layer, name, layer.half)()
    assert_same(layer.graph, before)


def test_a_dtype_is_for_features() -> None:
    graph = walked()
    assert graph.to("cpu", torch.float16) is graph
    assert graph.to("cpu", dtype=torch.bfloat16) is graph
    assert {x.dtype for x in tensors_of(graph.to("meta", torch.float16))} == {torch.int32}
    for wrong in (torch.int64, torch.bool, "float16", True):
        with pytest.raises(TypeError, match=r"dtype must be .* got .*"):
            graph.to("cpu", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), {}),
        ((None,), {}),  # as accelerate's cpu_offload does
        ((None, torch.bfloat16), {}),
        ((), {"device": None, "dtype": torch.bfloat16}),
        ((torch.bfloat16,), {"non_blocking": True}),
        ((), {"dtype": torch.bfloat16}),
        ((), {"memory_format": torch.preserve_format}),
    ],
)
def test_a_graph_that_is_sent_nowhere_is_itself(device: str, given: tuple, named: dict) -> None:
    graph = walked().to(device)
    assert torch.ones(2, device=device).to(*given, **named).device.type == device
    assert graph.to(*given, **named) is graph
    twin = graph.to(*given, **named, copy=True)
    assert twin is not graph
    assert twin.device == graph.device


def test_a_tensor_stands_for_its_device() -> None:
    graph = walked()
    assert graph.to(torch.ones(2)) is graph
    moved = graph.to(torch.ones(2, device="meta"), memory_format=torch.contiguous_format)
    assert {x.device.type for x in held(moved)} == {"meta"}


def test_a_copy_on_the_same_device_shares_nothing() -> None:
    graph = walked()
    twin = graph.to("cpu", copy=True)
    assert_same(twin, graph)
    assert twin.graph_ptr is twin.col_graph_ptr
    ours = {x.data_ptr() for x in held(graph) if x.numel()}
    assert not ours & {x.data_ptr() for x in held(twin) if x.numel()}
    assert graph.to("cpu", copy=False) is graph


def test_a_moved_graph_is_planned_anew_and_a_copied_one_is_not() -> None:
    graph = walked()
    graph.prepared.plans[16, torch.float32] = graph.plan_for(16, torch.float32)
    assert (16, torch.float32) in graph.to("cpu", copy=True).prepared.plans
    assert (16, torch.float32) not in graph.to("meta").prepared.plans
    named = graph.plan("windows")
    assert named.to("meta").settled == named.settled


def test_pinning_pins_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()
    asked: list[tuple[str, ...]] = []

    def pin(x: torch.Tensor, *device: str) -> torch.Tensor:
        asked.append(device)
        twin = x.clone()
        pinned.add(twin.data_ptr())
        return twin

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.data_ptr() in pinned)
    graph = walked()
    assert not graph.is_pinned()
    batch = pin_memory({"x": torch.ones(2), "graphs": [graph]})  # as a DataLoader does
    twin = batch["graphs"][0]
    assert twin.is_pinned()
    assert {x.data_ptr() for x in held(twin) if x.numel()} <= pinned
    assert twin.pin_memory() is twin
    assert twin.graph_ptr is twin.col_graph_ptr
    assert_same(twin, graph)
    assert pyg_data(graph).pin_memory().graph.is_pinned()
    assert set(asked) == {()}
    assert graph.pin_memory("cuda").is_pinned()
    assert asked[-1] == ("cuda",)


def test_sharing_shares_all_of_it() -> None:
    data = pyg_data(walked())
    graph = data.graph
    assert data.share_memory_().graph is graph
    assert all(x.is_shared() for x in held(graph))


def test_a_stream_that_uses_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # else the memory of a prefetched batch may be given away while it is read
    seen = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: seen.append(id(x)))
    data = pyg_data(walked())
    data.record_stream(object())
    assert {id(x) for x in held(data.graph)} <= set(seen)


def collection(data: Any, dtype: type, function: Callable[[Any], Any]) -> Any:
    """``lightning_utilities.apply_to_collection``, as far as it concerns objects like a Graph."""
    if isinstance(data, dtype):
        return function(data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        values = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
        result = copy.deepcopy(data, memo={id(x): x for x in values.values()})
        for name, value in values.items():
            setattr(result, name, collection(value, dtype, function))
        return result
    if isinstance(data, dict):
        return {key: collection(x, dtype, function) for key, x in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(collection(x, dtype, function) for x in data)
    return data


def returned(batch: Any) -> tuple[list[Any], Any, bool]:
    """What DistributedDataParallel makes of a module's output, with tensors in half precision."""
    tensors, spec, is_rref = _tree_flatten_with_rref(batch)
    # those without a gradient are put back as they were
    return [x.half() if x.is_floating_point() else x for x in tensors], spec, is_rref


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half() if x.is_floating_point() else x.clone()


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda batch: collection(batch, torch.Tensor, half),
        lambda batch: _apply_to_tensors(half, batch),
        lambda batch: tree_map(lambda x: x.half() if x.is_floating_point() else x, batch),
        lambda batch: _tree_unflatten_with_rref(*returned(batch)),
    ],
    ids=["lightning", "fsdp", "fully_shard", "ddp"],
)
def test_rebuilding_a_batch_keeps_the_graph(rebuild: Callable[[Any], Any]) -> None:
    graph = walked()
    batch = rebuild({"x": torch.ones(6, 2, 4), "graph": graph})
    assert batch["x"].dtype == torch.float16
    # the very one: rebuilt from its fields, it would sort its columns in every step
    assert batch["graph"] is graph


class Transferable(ABC):  # noqa: B024
    """Lightning's ``_TransferableDataType``: whatever has a method ``to``."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return callable(getattr(kind, "to", None))


def test_a_graph_is_moved_to_a_device_as_lightning_does() -> None:
    def move(x: Any) -> Any:
        options = {"non_blocking": True} if isinstance(x, torch.Tensor) else {}
        return x.to(torch.device("meta"), **options)

    graph = walked()
    batch = collection({"x": torch.ones(2), "graphs": [graph]}, Transferable, move)
    assert batch["x"].device.type == "meta"
    assert {x.device.type for x in held(batch["graphs"][0])} == {"meta"}


def test_a_graph_is_sent_to_a_device_as_accelerate_does() -> None:
    def send(x: Any, device: torch.device) -> Any:
        if hasattr(x, "to"):
            return x.to(device, non_blocking=True)
        return type(x)(send(part, device) for part in x)

    x, graph = send((torch.ones(2), walked()), torch.device("meta"))
    assert x.device.type == graph.device.type == "meta"


def rows(batch: list[int]) -> tuple[torch.Tensor, Graph]:
    return torch.tensor(batch), Graph.batch([walked() for _ in batch])


def test_graphs_come_from_the_workers_of_a_loader() -> None:
    loader = DataLoader(range(4), batch_size=2, collate_fn=rows, num_workers=1)
    expected = Graph.batch([walked(), walked()])
    for _, graph in loader:
        assert_same(graph, expected)
        assert graph.graph_ptr is graph.col_graph_ptr
        x = torch.randn(12, 2, 4, requires_grad=True)
        neighborhood_attention(x, x, x, graph).sum().backward()
