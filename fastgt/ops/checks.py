"""What the attention operators take: casts, numbers and refusals by name."""

from __future__ import annotations

import math
import operator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from fastgt.contract import Dropout, PairDropout
from fastgt.graph import Graph
from fastgt.graph_build import check_boundaries, check_index
from fastgt.philox import DropoutSeed, PairDropoutSeed
from fastgt.shard import NotOnRanks, Shard
from fastgt.tiles import MAX_WIDTH

_HALF = (torch.float16, torch.bfloat16)
FLOATS = (*_HALF, torch.float32, torch.float64)


# asked once: Dynamo of torch 2.11 cannot trace the question
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia")
    if torch.amp.is_autocast_available(device)
) | {torch._C._get_privateuse1_backend_name()}


def autocasts(device: str) -> bool:
    # meta and other devices without autocast are refused by is_autocast_enabled
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """What is computed inside has the dtypes of what it is computed from."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in (*_HALF, torch.float32) else x


def clamp_bounds(logit_clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if logit_clamp is None:
        return -math.inf, math.inf
    if isinstance(logit_clamp, (tuple, list)):
        if len(logit_clamp) != 2:
            raise ValueError(f"logit_clamp must be (low, high), got {len(logit_clamp)} numbers")
        low, high = (number("logit_clamp", x) for x in logit_clamp)
    else:
        high = number("logit_clamp", logit_clamp)
        low = -high
    if not low <= high:
        raise ValueError(f"logit_clamp must have low <= high, got {logit_clamp}")
    return low, high


def number(name: str, x: object) -> float:
    if not isinstance(x, (int, float)) and (isinstance(x, Tensor) or not hasattr(x, "__float__")):
        hint = ": multiply q by it" if name == "scale" and isinstance(x, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(x).__name__}{hint}")
    return float(x)


def integer(name: str, x: object, least: int | None = None) -> int:
    """A Python int, of ``least`` (0 or 1) at least; NumPy's integers are taken, floats are not."""
    try:
        if isinstance(x, bool):
            raise TypeError
        found = operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        value = f" {x}" if isinstance(x, (bool, float)) else ""
        raise TypeError(f"{name} must be an int, got {type(x).__name__}{value}") from None
    if least is not None and found < least:
        wanted = "be positive" if least else "not be negative"
        raise ValueError(f"{name} must {wanted}, got {found}")
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {found}")
    return found


def check_graph(graph: object) -> None:
    """A graph, or a rank's share of one: operators run on that before they ask, models may."""
    if not isinstance(graph, (Graph, Shard)):
        raise TypeError(
            f"graph must be a fastgt.Graph, got {type(graph).__name__}: make one, for all calls, "
            "with Graph.from_edge_index(edge_index, num_nodes), where num_nodes of a bipartite "
            "graph is (targets, sources)"
        )


def check_whole(graph: object) -> None:
    """Not a rank's share of a graph, of which an encoding would be one of its own rows alone."""
    if isinstance(graph, Shard):
        raise NotOnRanks(
            f"graph must be a whole fastgt.Graph, got a {type(graph).__name__}: what asks for it "
            "does not run on a graph that lies on several ranks"
        )


def check_square(graph: Graph, *, shared: bool = False) -> int:
    """The number of nodes of a graph that has as many rows as columns.

    ``shared``: whether a rank's share of a graph will do, of which it is the number of own nodes.
    """
    check_graph(graph)
    if not shared:
        check_whole(graph)
    n = graph.num_rows
    if n != graph.num_cols:
        raise ValueError(f"graph must be square, got {n} rows and {graph.num_cols} columns")
    return n


def check_attention(q: Tensor, k: Tensor, v: Tensor, graph: Graph) -> None:
    """q, k, v and the graph fit each other."""
    check_graph(graph)
    check_nodes(q, k, v)
    if graph.device != q.device:
        raise ValueError(f"graph is on {graph.device} but q is on {q.device}: use graph.to()")
    rows, heads, width = q.shape
    columns, kv_heads, k_width = k.shape
    values, v_heads, _ = v.shape
    _check_count("q", rows, graph.num_rows, "rows")
    _check_count("k", columns, graph.num_cols, "columns")
    _check_count("v", values, graph.num_cols, "columns")
    if k_width != width:
        raise ValueError(f"k has head width {k_width} but q has {width}")
    if v_heads != kv_heads:
        raise ValueError(f"v has {v_heads} heads but k has {kv_heads}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    check_widths(
        q,
        v,
        "or, where nodes attend to all nodes of their graph, take global_attention, up to 512 wide",
    )


def _check_count(name: str, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{name} has {found} rows but the graph has {wanted} {what} (num_nodes of "
            "Graph.from_edge_index says how many)"
        )


def check_nodes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v are [N, H, D] of one kind, whatever their sizes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must be [N, H, D], got {list(x.shape)}")
    # nearly every call fits, and the host waits for its checks
    if not (k.dtype == v.dtype == q.dtype and k.device == v.device == q.device):
        _check_like_q("k", k, q)
        _check_like_q("v", v, q)


def check_float(name: str, x: object) -> None:
    """A strided tensor of a dtype that the operators take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a strided tensor, got {found}")


def check_generator(generator: object) -> None:
    """A generator, or None for PyTorch's own."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )


def check_widths(q: Tensor, v: Tensor, instead: str, widest: int = MAX_WIDTH) -> None:
    """``instead``: what takes wider heads, or may stand in their place."""
    for name, d in (("q", q.shape[2]), ("v", v.shape[2])):
        if not 1 <= d <= widest:
            hint = f": let the linear layers before make more heads, {instead}" if d else ""
            raise ValueError(f"{name} has head width {d}; supported are 1 to {widest}{hint}")


def check_offsets(offsets: object, nodes: int, device: torch.device, name: str = "offsets") -> None:
    """Boundaries of the graphs of a batch of so many nodes; values only where they are at hand."""
    if isinstance(offsets, Shard):
        return
    if not isinstance(offsets, Tensor):
        hint = ": its graph_ptr is" if isinstance(offsets, Graph) else ""
        raise TypeError(f"{name} must be a tensor of integers, got {type(offsets).__name__}{hint}")
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.layout != torch.strided:
        raise TypeError(f"{name} must be int32 or int64, got {offsets.dtype} ({offsets.layout})")
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name} must be [G + 1], got {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name} is on {offsets.device} but the nodes are on {device}")
    if readable(offsets):
        if offsets.shape[0] == nodes and int(offsets[-1]) != nodes:
            raise ValueError(
                f"{name} has an entry for each of the {nodes} nodes: it takes the boundaries of "
                "the graphs (PyG's batch.ptr, not batch.batch)"
            )
        check_boundaries(offsets, name, nodes, "nodes")


def readable(x: Tensor) -> bool:
    """Whether x has values, and they are at hand: not on a GPU, nor while a call is traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # of vmap, for one
        return False
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxy is None and not is_fake(x)


def node_ids(name: str, x: Tensor, nodes: int, device: torch.device) -> Tensor:
    """Numbers of nodes as int64, from 0 to ``nodes - 1`` where their values are at hand."""
    check_index(x, name)
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    x = x.long()
    if readable(x):
        flat = x.flatten()
        if len(beyond := ((flat < 0) | (flat >= nodes)).nonzero()):
            found = f"{int(flat[beyond[0]])} at {int(beyond[0])}"
            raise ValueError(f"{name} must be from 0 to {nodes - 1}, got {found}")
    return x


def node_pairs(name: str, x: Tensor, nodes: int, device: torch.device) -> Tensor:
    """``[2, B]`` numbers of nodes as int64, checked as :func:`node_ids` does."""
    x = node_ids(name, x, nodes, device)
    if x.ndim != 2 or len(x) != 2:
        raise ValueError(f"{name} must be [2, B], source above target, got {list(x.shape)}")
    return x


def check_times(name: str, time: Tensor) -> None:
    """Refuse times of events, on a CPU, that fall or are no numbers."""
    if time.is_floating_point() and not bool(time.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(time[~time.isfinite()][0])}")
    fallen = (time[1:] < time[:-1]).nonzero()
    if len(fallen):
        event = int(fallen[0]) + 1
        raise ValueError(
            f"{name} must not go back: event {event} is at {time[event].item()} and event "
            f"{event - 1} at {time[event - 1].item()}"
        )


def check_edge_tensor(name: str, x: object, q: Tensor, letters: str, *shape: int) -> None:
    """``x`` is a tensor like q, of that shape, whose dimensions are called ``letters``."""
    _check_like_q(name, x, q)
    assert isinstance(x, Tensor)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be [{letters}] = {list(shape)}, got {list(x.shape)}")


def check_edge_attr(
    edge_attr: Tensor | None,
    edge_key_weight: Tensor | None,
    edge_value_weight: Tensor | None,
    q: Tensor,
    v: Tensor,
    edges: int,
) -> None:
    """The attributes have a weight, the weights have attributes, and both have C channels."""
    weights = (
        ("edge_key_weight", edge_key_weight, "C, H, D", q.shape[2]),
        ("edge_value_weight", edge_value_weight, "C, H, Dv", v.shape[2]),
    )
    given = [name for name, weight, _, _ in weights if weight is not None]
    if edge_attr is None:
        if given:
            raise ValueError(f"{given[0]} needs edge_attr, which is None")
        return
    _check_like_q("edge_attr", edge_attr, q)
    if not given:
        raise ValueError(
            "edge_attr needs edge_key_weight, edge_value_weight or both: both are None"
        )
    if edge_attr.ndim != 2 or edge_attr.shape[0] != edges:
        raise ValueError(f"edge_attr must be [E, C] = [{edges}, C], got {list(edge_attr.shape)}")
    channels = edge_attr.shape[1]
    if not 1 <= channels <= MAX_WIDTH:
        raise ValueError(f"edge_attr has {channels} channels; supported are 1 to {MAX_WIDTH}")
    for name, weight, letters, width in weights:
        if weight is not None:
            check_edge_tensor(name, weight, q, letters, channels, q.shape[1], width)


def check_gate(edge_gate: Tensor, q: Tensor, edges: int) -> None:
    """[E, H] or [E, H, D]."""
    _check_like_q("edge_gate", edge_gate, q)
    _, heads, width = q.shape
    if tuple(edge_gate.shape) not in ((edges, heads), (edges, heads, width)):
        raise ValueError(
            f"edge_gate must be [E, H] = [{edges}, {heads}] or [E, H, D] = [{edges}, {heads}, "
            f"{width}], got {list(edge_gate.shape)}"
        )


def check_numbers(
    q: Tensor, scale: float | None, eps: float, dropout_p: float, eps_name: str = "denominator_eps"
) -> None:
    if scale is not None and not abs(scale) <= largest(q):
        raise ValueError(f"scale must be finite, got {scale} for {q.dtype}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{eps_name} must be finite and not negative, got {eps}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")


def edge_dropout(
    p: float, seed: int | Tensor | DropoutSeed | None, edges: int, device: torch.device
) -> Dropout:
    """What the dropout of so many edges hangs on."""
    numbers, first = None, 0
    if isinstance(seed, PairDropoutSeed):
        raise TypeError("dropout_seed of edges must be a DropoutSeed, got a PairDropoutSeed")
    if isinstance(seed, DropoutSeed):
        seed, numbers, first = seed
        first = check_first_head(first)
        if numbers is not None:
            check_counters("edge_numbers", numbers, edges, "the graph", "edges", device)
    key = dropout_key(seed, device)
    return Dropout(key, numbers, p, first) if p else Dropout(None, None, p)


def pair_dropout(
    p: float, seed: int | Tensor | PairDropoutSeed | None, q: Tensor, k: Tensor
) -> PairDropout:
    """What the dropout of all pairs of queries and keys hangs on."""
    queries, keys, first = None, None, 0
    if isinstance(seed, DropoutSeed):
        raise TypeError("dropout_seed of pairs must be a PairDropoutSeed, got a DropoutSeed")
    if isinstance(seed, PairDropoutSeed):
        seed, queries, keys, first = seed
        first = check_first_head(first)
        if queries is not None or keys is not None:
            check_counters("query_numbers", queries, q.shape[0], "q", "nodes", q.device)
            check_counters("key_numbers", keys, k.shape[0], "k", "nodes", q.device)
    key = dropout_key(seed, q.device)
    return PairDropout(key, queries, keys, p, first) if p else PairDropout()


def check_first_head(x: object) -> int:
    """The number by which dropout knows head 0."""
    # an int at once, as in dropout_key
    first = x if isinstance(x, int) and not isinstance(x, bool) else integer("first_head", x)
    if not 0 <= first < 2**31:
        raise ValueError(f"first_head must be from 0 to 2^31 - 1, got {first}")
    return first


def check_counters(
    name: str, x: object, count: int, owner: str, what: str, device: torch.device
) -> None:
    """``count`` int64, none below 0: the numbers of ``what`` that ``owner`` has."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of int64, got {type(x).__name__}")
    if x.dtype != torch.int64 or x.layout != torch.strided:
        raise TypeError(f"{name} must be int64, got {x.dtype} ({x.layout})")
    if x.ndim != 1:
        raise ValueError(f"{name} must be [{count}], got {list(x.shape)}")
    if x.shape[0] != count:
        raise ValueError(f"{name} has {x.shape[0]} entries but {owner} has {count} {what}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but {owner} is on {device}")
    if readable(x) and count and int(x.min()) < 0:
        at = int((x < 0).nonzero()[0])
        raise ValueError(f"{name} must not be negative, got {int(x[at])} at {at}")


def dropout_key(
    seed: int | Tensor | None,
    device: torch.device,
    name: str = "dropout_seed",
    owner: str = "q",
) -> Tensor:
    """The 64 bits that dropout hangs on, ``[1]`` int64; drawn from PyTorch's generator for None."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    # an int at once: a compiled program may have a dynamic one, which has no attributes
    if isinstance(seed, int) or (not isinstance(seed, Tensor) and hasattr(seed, "__index__")):
        seed = seed if isinstance(seed, int) else operator.index(seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{name} must fit in 64 bits, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"{name} must be an int or a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{name} must be one int64, got {list(seed.shape)} of {seed.dtype}")
    if seed.device != device:
        raise ValueError(f"{name} is on {seed.device} but {owner} is on {device}")
    return seed.reshape(1)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("forward-mode derivatives are taken by impl='reference' only")


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def largest(x: Tensor) -> float:
    """The largest number of what sums over ``x`` are kept in."""
    return torch.finfo(accumulator(x)).max


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_like_q(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} is {x.dtype} but q is {q.dtype}: pass {name}.to(q.dtype)")
    check_float(name, x)
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
