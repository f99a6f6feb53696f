"""Linear attention on ragged batches against padded ones: the operator, and
fastgt.pyg.PerformerAttention against torch-geometric's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from fastgt import implementation, linear_attention, reference
from fastgt.bench import peer_paths
from fastgt.bench.attention import draw
from fastgt.bench.harness import Case, Provider
from fastgt.bench.roofline import Work, passes
from fastgt.testing import PROBLEMS

if TYPE_CHECKING:
    from fastgt.pyg import PerformerAttention

RAGGED = "ragged"  # 256 graphs of 10 to 500 nodes; of other problems the graphs, without edges


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    peer_path: Path | None = None,
) -> Case:
    """Linear attention with features elu + 1."""
    sizes, offsets = sizes_of(problem, device)
    q, k, v, do = draw([(int(offsets[-1]), heads, width)] * 4, dtype, device)

    def padded() -> Provider:
        """As compositions do it: masked features, two products."""
        dense, packed = padding(sizes)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = dense(elu(q) + 1), dense(elu(k) + 1)  # [G, largest, H, D], padded with zeros
            state = torch.einsum("gnhd,gnhe->ghde", k, dense(v))
            out = torch.einsum("gnhd,ghde->gnhe", q, state)
            return packed(out / (torch.einsum("gnhd,ghd->gnh", q, k.sum(1)) + 1e-6)[..., None])

        return Provider(call)

    providers: dict[str, Callable[[], Provider]] = {
        "fastgt": lambda: Provider(
            lambda q, k, v: linear_attention(q, k, v, offsets, feature_map="elu")
        ),
        "padded einsum": padded,
    }
    for name, found in peer_paths.LINEAR_ATTENTION.items() if peer_path else ():
        providers[name] = lambda found=found: Provider(found(offsets, peer_path, feature_map="elu"))
    nodes, graphs, item = len(q), len(sizes), dtype.itemsize
    once = Work(4 * nodes * heads * width * item, 0, 4 * nodes * heads * width * (width + 1))
    back = Work(2 * once.once, 0, 10 * nodes * heads * width * (width + 1))
    return Case(
        shape={
            "problem": problem,
            "rows": nodes,
            "graphs": graphs,
            "heads": heads,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "node_order": "as loaded",
        },
        inputs={"q": q, "k": k, "v": v},
        upstream=do,
        definition=lambda dtype: Provider(
            lambda q, k, v: reference.linear_attention(q, k, v, offsets, feature_map="elu")
        ),
        providers=providers,
        work=passes(once, back),
    )


def performer(
    problem: str,
    *,
    heads: int = 4,
    width: int = 16,
    channels: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """PerformerAttention with its projections; gradients are those of x and all parameters.

    torch-geometric's counts padded keys in its denominators: as released it disagrees, and is not
    timed. Beside it stands the same module with the features of padded keys zeroed, which agrees.

    Raises:
        ImportError: torch-geometric is not installed.
        ValueError: The layer would run torch-geometric's own code.
    """
    from fastgt.pyg import PerformerAttention

    sizes, offsets = sizes_of(problem, device)
    nodes = int(offsets[-1])
    torch.manual_seed(0)
    ours = PerformerAttention(channels, heads, width).to(device, dtype)
    if why := ours.unfusable():
        raise ValueError(f"fastgt.pyg.PerformerAttention is not fused: {why}")
    x, do = draw([(nodes, channels)] * 2, dtype, device)

    def definition(dtype: torch.dtype) -> Provider:
        wide = copy.deepcopy(ours).to(dtype)

        def call(x: Tensor) -> Tensor:
            with implementation("reference"):
                return wide(x, offsets=offsets)

        return Provider(call, tuple(wide.parameters()))

    def padded(repaired: bool) -> Provider:
        theirs = _pyg(ours, repaired)
        return Provider(_padded(theirs, sizes), tuple(theirs.parameters()))

    return Case(
        shape={
            "problem": problem,
            "rows": nodes,
            "graphs": len(sizes),
            "heads": heads,
            "width": width,
            "features": ours.fast_attn.projection_matrix.shape[0],
            "channels": channels,
            "dtype": str(dtype).removeprefix("torch."),
            "node_order": "as loaded",
        },
        inputs={"x": x},
        upstream=do,
        definition=definition,
        providers={
            "fastgt": lambda: Provider(
                lambda x: ours(x, offsets=offsets), tuple(ours.parameters())
            ),
            "pyg": lambda: padded(False),
            "pyg, padded keys zeroed": lambda: padded(True),
        },
        parameters=tuple(name for name, _ in ours.named_parameters()),
    )


def sizes_of(problem: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Nodes of each graph, and their boundaries."""
    if problem == RAGGED:
        generator = torch.Generator().manual_seed(0)
        sizes = torch.randint(10, 501, (256,), generator=generator)
    else:
        sizes = PROBLEMS[problem].load().graph_ptr.long().diff()
    sizes = sizes.to(device)
    return sizes, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def padding(
    sizes: Tensor,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Into a batch padded with zeros, and out of it."""
    graphs, largest = len(sizes), int(sizes.max())
    number = torch.arange(graphs, device=sizes.device).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes)[number]
    place = torch.arange(len(number), device=sizes.device) - first

    def dense(x: Tensor) -> Tensor:
        return x.new_zeros(graphs, largest, *x.shape[1:]).index_put((number, place), x)

    return dense, lambda x: x[number, place]


def _pyg(ours: PerformerAttention, repaired: bool) -> nn.Module:
    """PyG's module with the parameters of ours."""
    from torch_geometric.nn.attention import PerformerAttention as PyG
    from torch_geometric.nn.attention import performer as module

    theirs = PyG(ours.attn_out.out_features, ours.heads, ours.head_channels)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(ours.q.weight)
    if not repaired:
        return theirs

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        projection = theirs.fast_attn.projection_matrix
        q, k = (module.generalized_kernel(x, projection) for x in (q, k))
        return module.linear_attention(q, k.masked_fill(~theirs.key_mask, 0.0), v)

    theirs.fast_attn.forward = forward
    return theirs


def _padded(theirs: nn.Module, sizes: Tensor) -> Callable[[Tensor], Tensor]:
    from torch_geometric.utils import to_dense_batch

    batch = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def f(x: Tensor) -> Tensor:
        dense, mask = to_dense_batch(x, batch)
        theirs.key_mask = mask[:, None, :, None]
        return theirs(dense, mask)[mask]

    return f
