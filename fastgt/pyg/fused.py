"""What the layers share: when torch-geometric's own code runs, and that somebody is told."""

from __future__ import annotations

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing, SumAggregation
from torch_geometric.typing import SparseTensor
from torch_geometric.utils import is_torch_sparse_tensor

from fastgt.graph import Graph
from fastgt.ops.checks import autocasts
from fastgt.ops.implementation import implementation
from fastgt.pyg.sharing import Edges, edges_of

_HOOKS = tuple(
    f"_{name}_forward_{when}"
    for name in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for when in ("pre_hooks", "hooks")
)
_METHODS = ("message", "aggregate", "message_and_aggregate", "update", "edge_update")
MARK = "_was_accelerated"  # of a layer that fastgt.accelerate replaced
_AUTOCAST = {torch.float16, torch.bfloat16, torch.float32}
_told: set[tuple[str, str]] = set()


def explain(model: nn.Module) -> dict[str, str]:
    """Which layers of a model run fused, and why the others run torch-geometric's own code.

    Returns:
        A sentence for each layer of :mod:`fastgt.pyg` in the model, by its name there. It is of
        the layer's last forward.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> from fastgt.pyg import TransformerConv, explain
        >>> model = torch.nn.Sequential(TransformerConv(8, 8, aggr="max"))
        >>> _ = model[0](torch.randn(2, 8), torch.tensor([[0], [1]]))
        >>> explain(model)
        {'0': "torch-geometric's own code runs: messages are put together by MaxAggregation()"}
    """
    check_module(model)
    return {name: layer.ran() for name, layer in model.named_modules() if isinstance(layer, Fused)}


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def transformed() -> str:
    """Why what runs around a layer takes derivatives or batches that kernels have not; else ""."""
    if torch.jit.is_tracing():
        return "torch.jit traces it"
    if torch.compiler.is_compiling():
        return ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it"
    return "" if forward_ad._current_level < 0 else "forward-mode derivatives are taken"


def as_transformed() -> AbstractContextManager[None]:
    """Operators take it, for a layer that PyG's code computes otherwise or not at all."""
    return implementation("reference") if transformed() else nullcontext()


class Fused:
    """A layer of torch-geometric whose computation is overridden.

    Attributes:
        PYG: torch-geometric's class.
        why_pyg: Why the last forward ran torch-geometric's own code; "" if it did not.
    """

    PYG: ClassVar[type[nn.Module]]
    why_pyg: str | None = None

    def ran(self) -> str:
        """What the last forward was, in a sentence."""
        if self.why_pyg is None:
            return "it has not run"
        return f"torch-geometric's own code runs: {self.why_pyg}" if self.why_pyg else "fused"

    def by_pyg(self, why: str, *args: Any, **kwargs: Any) -> Any:
        """torch-geometric's own forward; the first time, a warning says why.

        A Graph among the arguments gives its ``edge_index``, for torch-geometric has no such type.
        """
        self.tell(why)
        args = tuple(x.edge_index if isinstance(x, Graph) else x for x in args)
        return self.PYG.forward(self, *args, **kwargs)

    def tell(self, why: str) -> None:
        """Note why torch-geometric's code runs; the first time, warn."""
        self.note(why)
        told = type(self).__name__, why
        if not torch.compiler.is_compiling() and told not in _told:
            _told.add(told)
            warnings.warn(
                f"fastgt.pyg.{told[0]} runs torch-geometric's own code: {why}", stacklevel=4
            )

    def note(self, why: str) -> None:
        """Keep why torch-geometric's code runs, "" where it does not, for :func:`explain`."""
        if not torch.compiler.is_compiling() and self.why_pyg != why:
            self.why_pyg = why

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: torch-geometric's layer with the same parameters."""
        return as_pyg(self)


def as_pyg(layer: Any) -> nn.Module:
    """torch-geometric's layer with the parameters, buffers and hooks of a fused one."""
    theirs = layer.PYG.__new__(layer.PYG)
    theirs.__dict__ = {k: x for k, x in layer.__dict__.items() if k not in (MARK, "why_pyg")}
    if isinstance(theirs, MessagePassing):
        theirs._set_jittable_templates()
    return theirs


class FusedMessages(Fused):
    """A :class:`Fused` ``MessagePassing``.

    Attributes:
        propagates: Whether the class is a subclass that has written ``propagate`` itself, or
            ``edge_updater``.
    """

    propagates = False

    def _set_jittable_templates(self: Any, raise_on_error: bool = False) -> None:
        # PyG reads from a class's source what its messages take, and tells classes by their names
        self.inspector._source_dict.setdefault(self.PYG.__name__, inspect.getsource(self.PYG))
        super()._set_jittable_templates(raise_on_error)  # type: ignore[misc]
        kind = type(self)
        for name in ("propagate", "edge_updater"):
            # PyG keeps what it compiled for the base class as what stood there before, but an
            # explainer's masks are in MessagePassing's own alone
            compiled = [vars(base).get(f"_jinja_{name}") for base in kind.__mro__[1:]]
            if vars(kind).get(f"_orig_{name}") in [x for x in compiled if x is not None]:
                setattr(kind, f"_orig_{name}", getattr(MessagePassing, name))
            # what a class has written itself is not compiled
            written = vars(kind).get(name)
            if written is not None and written is vars(kind).get(f"_orig_{name}"):
                kind.propagates = "PYG" not in vars(kind)

    @staticmethod
    def plain(edge_index: Any) -> bool:
        """Whether it is ``[2, E]``, not a matrix."""
        return (
            isinstance(edge_index, Tensor)
            and edge_index.layout == torch.strided
            and not isinstance(edge_index, SparseTensor)
        )

    def unfusable(self: Any, nodes: tuple[Tensor | None, ...], edge_index: Any) -> str:
        """Why messages of these nodes cannot be fused; "" if they can."""
        if why := transformed():
            return why
        if not all(x is None or isinstance(x, Tensor) for x in nodes):
            return "its inputs are not tensors"
        if self.explain:
            return "an explainer masks its messages"
        if self.decomposed_layers > 1:
            return "its channels are decomposed"
        if self.node_dim not in (0, -2):
            return f"nodes stand in dimension {self.node_dim}"
        aggr = self.aggr_module
        if type(aggr) is not SumAggregation:
            return f"messages are put together by {aggr}"
        if any(getattr(self, name) for name in _HOOKS):
            return "its messages have hooks"
        if aggr._forward_hooks or aggr._forward_pre_hooks or "forward" in aggr.__dict__:
            return "what puts messages together has hooks"
        if why := self._own_propagation():
            return why
        for name in _METHODS:
            if name in self.__dict__ or getattr(type(self), name) is not getattr(self.PYG, name):
                return f"it has a {name} of its own"
        if self.flow == "target_to_source" and nodes[0] is not nodes[1]:
            return "messages flow from targets to sources, which are other nodes"
        for x in nodes:
            if x is None:
                continue
            if x.dim() != 2 or x.layout != torch.strided:
                return "node features are not [N, channels]: a static graph, or sparse features"
            if not x.is_floating_point():
                return "node features are not floating-point"
        return self._odd_edges(edge_index)

    @staticmethod
    def promoted(x: Tensor, e: Tensor) -> str:
        """Why nodes and edges need another type, which autocast would give them."""
        cast = autocasts(x.device.type) and {x.dtype, e.dtype} <= _AUTOCAST
        if x.dtype == e.dtype or cast:
            return ""
        return f"edges are {e.dtype} but nodes {x.dtype}"

    def _own_propagation(self: Any) -> str:
        """What PyG compiles for each class is none of its own; what a subclass has written is."""
        kind, own = type(self), self.__dict__
        for name in ("propagate", "edge_updater"):
            if name in own and getattr(own[name], "__func__", None) not in (
                getattr(MessagePassing, name),
                getattr(kind, f"_jinja_{name}", None),
            ):
                return f"it has a {name} of its own"
        return "it has a propagation of its own" if kind.propagates else ""

    def _odd_edges(self: Any, edge_index: Any) -> str:
        if isinstance(edge_index, (Graph, SparseTensor)):
            sparse = isinstance(edge_index, SparseTensor)
        elif not isinstance(edge_index, Tensor):
            return f"edge_index is a {type(edge_index).__name__}"
        else:
            sparse = is_torch_sparse_tensor(edge_index)
            if not sparse and (edge_index.dim() != 2 or edge_index.shape[0] != 2):
                return "edge_index is not [2, E]"
            if sparse and edge_index.layout not in (torch.sparse_coo, torch.sparse_csr):
                return f"edge_index has the layout {edge_index.layout}"
            if sparse and edge_index.layout == torch.sparse_coo and not edge_index.is_coalesced():
                return "edge_index is not coalesced"
        if sparse and self.flow == "target_to_source":
            return "edge_index is sparse and messages flow from targets to sources"
        return ""

    def with_weights(self: Any, out: Tensor, edge_index: Any, weights: Tensor) -> Any:
        """What torch-geometric returns where weights of edges are asked for."""
        if isinstance(edge_index, SparseTensor):
            return out, edge_index.set_value(weights, layout="coo")
        if isinstance(edge_index, Graph):
            edge_index = edge_index.edge_index
        return out, (edge_index, weights)

    def edges(
        self: Any, edge_index: Any, source: Tensor, target: Tensor | None, size: Any = None
    ) -> Edges:
        """The Graph of an ``edge_index``.

        Raises:
            ValueError: Its sizes are not those of the nodes; both are given.
        """
        known: Any = (None, None) if size is None else size
        if isinstance(edge_index, Graph):
            known = edge_index.num_cols, edge_index.num_rows
        elif isinstance(edge_index, EdgeIndex):
            known = edge_index.num_rows, edge_index.num_cols
        elif isinstance(edge_index, SparseTensor) or is_torch_sparse_tensor(edge_index):
            known = edge_index.size(1), edge_index.size(0)
        sources = source.shape[0]
        targets = known[1] if target is None else target.shape[0]
        targets = sources if targets is None else targets
        if known[0] not in (None, sources) or known[1] not in (None, targets):
            ends = ["any" if n is None else n for n in known]
            raise ValueError(
                f"edges go from {ends[0]} sources to {ends[1]} targets but x has {sources} and "
                f"{targets}"
            )
        return edges_of(edge_index, sources, targets, self.flow)
