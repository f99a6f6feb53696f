"""GPU kernels of others that are no packages of ours: found in checkouts under a folder the user
names, imported from there and called. None of their code is here.

An adapter is called once for a graph, or for the offsets of a batch, and gives the function to
time. It raises ImportError where the source is absent, or something that it imports, and
NotImplementedError for what the peer cannot do. APIs are those of the commits named below.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import elu

from fastgt import Graph

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def anemoi(graph: Graph, folder: Path) -> Attend:
    """The Triton graph transformer of github.com/ecmwf/anemoi-core, as at commit 2cb9b6e.

    Its edge features, which it adds to keys and to values, are mandatory: they are zeros here, made
    once for a shape. It reads them with every edge all the same, and its backward pass writes their
    gradient: two tensors of size edges x heads x width that the task does not need.
    """
    peer = "anemoi"
    file = _find(
        peer, folder, "models/src/anemoi/models/triton/gt.py", "anemoi/models/triton/gt.py"
    )
    _check_device(peer, graph.device)
    convolve = _run(peer, file).graph_transformer_attention_conv
    walk = graph.columns
    # its own builder makes int64, and its kernels multiply offsets in the type of the indices
    csc = graph.col.long(), graph.row_ptr.long()
    reverse = walk.ptr.long(), walk.slot.long(), graph.row.long()

    @functools.lru_cache(maxsize=1)
    def edges(heads: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(graph.num_edges, heads, width, dtype=dtype, device=graph.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check_heads(peer, q, k, v)
        _check_one_width(peer, q, v)
        return convolve(q, k, v, edges(*q.shape[1:], q.dtype), csc, reverse)

    return attend


def turbo_gnn(graph: Graph, folder: Path) -> Attend:
    """The CUDA graph transformer of github.com/yandex-research/On-Efficient-Scaling-Of-GNNs, as at
    commit e26d564.

    Its CUDA extension must stand beside it, so a bare checkout is not enough; ``folder`` may be the
    site-packages that it was installed to. Its "query" belongs to the source of an edge and its
    "key" to the target: here they trade places. It tunes its forward pass in the first call for a
    graph. Gradients of its keys, our queries, add up atomically unless the graph is symmetric.
    """
    peer = "turbo-gnn"
    file = _find(peer, folder, "turbo_gnn/ops.py")
    _check_device(peer, graph.device)
    if graph.num_rows != graph.num_cols:
        raise NotImplementedError(
            f"{peer} takes square graphs, not {graph.num_rows} rows and {graph.num_cols} columns"
        )
    aggregate = _import(peer, file, "turbo_gnn.ops").graph_transformer_aggr
    layout = _import(peer, file.with_name("graph.py"), "turbo_gnn.graph")
    # from the edges, not from our walks: columns in order are how it finds a graph symmetric
    adjacency = layout.AdjacencyForwardBackwardWithNodeBuckets.from_edge_list(
        graph.edge_index, graph.num_rows, index_dtype=graph.col.dtype
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check_heads(peer, q, k, v)
        _check_one_width(peer, q, v)
        width = q.shape[2]
        if width not in (32, 64, 128, 256):
            raise NotImplementedError(f"{peer} takes heads of 32, 64, 128 and 256, not {width}")
        return aggregate(adjacency, q, Q=k, K=q, V=v, scale=1 / math.sqrt(width), autotune=True)

    return attend


def flash_bla(
    offsets: Tensor, folder: Path, *, feature_map: str = "identity", eps: float = 1e-6
) -> Attend:
    """The packed Triton kernels of github.com/fla-org/flash-bidirectional-linear-attention, as at
    commit dd22276; checkouts from before August 2026 have no such file.

    ``fastgt.linear_attention(q, k, v, offsets, feature_map=feature_map, eps=eps, normalize=True)``.
    It has no feature map: that one is plain PyTorch before the kernel, as in the modules there.
    It divides by means where the definition has sums: ``eps`` is divided likewise, by the nodes of
    the largest graph, and so is less than asked for in the smaller ones.
    """
    peer = "flash-bidirectional-linear-attention"
    file = _find(peer, folder, "flash_bla/ops/linear_attn/varlen.py")
    _check_device(peer, offsets.device)
    features = _features(peer, feature_map)
    attention = _import(peer, file, "flash_bla.ops.linear_attn.varlen").varlen_linear_attention
    bounds = torch.unique_consecutive(offsets).int()  # it takes no empty graphs
    largest = _largest(peer, bounds)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check_heads(peer, q, k, v)
        if max(q.shape[2], v.shape[2]) > 128:
            raise NotImplementedError(
                f"{peer} takes heads of up to 128, not {max(q.shape[2], v.shape[2])}"
            )
        return attention(features(q), features(k), v, bounds, largest, eps=eps / largest)

    return attend


def flash_bla_padded(
    offsets: Tensor, folder: Path, *, feature_map: str = "identity", eps: float = 1e-6
) -> Attend:
    """The same repository's kernels for sequences of one length: graphs are padded to the largest.

    ``fastgt.linear_attention(q, k, v, offsets, feature_map=feature_map, eps=eps, normalize=True)``,
    for features are padded with zeros, which add nothing. Where all graphs are of one size nothing
    is padded.
    """
    peer = "flash-bidirectional-linear-attention"
    file = _find(peer, folder, "flash_bla/ops/linear_attn/fused.py")
    _check_device(peer, offsets.device)
    features = _features(peer, feature_map)
    attention = _import(peer, file, "flash_bla.ops.linear_attn.fused").linear_attention
    bounds = torch.unique_consecutive(offsets).long()
    largest, graphs = _largest(peer, bounds), len(bounds) - 1
    nodes = int(bounds[-1])
    number = torch.arange(graphs, device=bounds.device)
    number = number.repeat_interleave(bounds.diff(), output_size=nodes)  # [N] of each node's graph
    place = torch.arange(nodes, device=bounds.device) - bounds[number]  # [N] within its graph

    def padded(x: Tensor) -> Tensor:
        """[N, H, D] -> [G, H, largest, D]"""
        if nodes == graphs * largest:
            return x.unflatten(0, (graphs, largest)).transpose(1, 2)
        dense = x.new_zeros(graphs, x.shape[1], largest, x.shape[2])
        return dense.transpose(1, 2).index_put((number, place), x).transpose(1, 2)

    def packed(x: Tensor) -> Tensor:
        """[G, H, largest, D] -> [N, H, D]"""
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if nodes == graphs * largest else x[number, place]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check_heads(peer, q, k, v)
        for width in (q.shape[2], v.shape[2]):
            # its backward pass takes a whole head at once, and Triton multiplies no less than 16
            if width < 16 or width & (width - 1):
                raise NotImplementedError(
                    f"{peer}, padded, takes heads of a power of two from 16, not {width}"
                )
        q, k, v = padded(features(q)), padded(features(k)), padded(v)
        return packed(attention(q, k, v, eps=eps / largest))

    return attend


ATTENTION = {"anemoi": anemoi, "turbo-gnn": turbo_gnn}
LINEAR_ATTENTION = {
    "flash-bidirectional-linear-attention": flash_bla,
    "flash-bidirectional-linear-attention, padded": flash_bla_padded,
}

_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "elu": lambda x: elu(x) + 1,
}


def _features(peer: str, name: str) -> Callable[[Tensor], Tensor]:
    if name not in _FEATURES:
        raise NotImplementedError(f"{peer} is called with {', '.join(_FEATURES)}, not {name}")
    return _FEATURES[name]


def _largest(peer: str, bounds: Tensor) -> int:
    if len(bounds) < 2:
        raise NotImplementedError(f"{peer} takes no batch without nodes")
    return int(bounds.diff().max())


def _check_device(peer: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise NotImplementedError(f"{peer} runs on a GPU, not on {device}")


def _check_heads(peer: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(f"{peer} takes float32 and narrower types, not {q.dtype}")
    if k.shape[1] != q.shape[1]:
        raise NotImplementedError(
            f"{peer} takes a key head for every query head, not {k.shape[1]} for {q.shape[1]}"
        )


def _check_one_width(peer: str, q: Tensor, v: Tensor) -> None:
    if v.shape[2] != q.shape[2]:
        raise NotImplementedError(
            f"{peer} takes values as wide as keys, not {v.shape[2]} and {q.shape[2]}"
        )


def _find(peer: str, folder: Path, *paths: str) -> Path:
    """The first of the paths: in the folder, which may be the checkout, or up to two below it."""
    for above in ("", "*/", "*/*/"):
        for path in paths:
            for file in sorted(Path(folder).glob(above + path)):
                return file.resolve()
    raise ImportError(f"{peer}: {paths[0]} not found under {folder}")


@functools.cache
def _run(peer: str, file: Path) -> ModuleType:
    """The module that is that file, without the packages around it; once, as it registers."""
    spec = importlib.util.spec_from_file_location(f"fastgt_peer_{peer}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, ValueError) as error:  # the latter is anemoi's, without Triton
        raise ImportError(f"{peer}, from {file}: {error}") from error
    return module


def _import(peer: str, file: Path, name: str) -> ModuleType:
    """The module of that name, which is that file, with its package beside it."""
    root = str(file.parents[name.count(".")])
    sys.path.insert(0, root)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{peer}, from {file}: {error}") from error
    finally:
        sys.path.remove(root)
    if module.__file__ is None or Path(module.__file__).resolve() != file:
        raise ImportError(f"{peer}: {name} is {module.__file__} already, and not {file}")
    return module
