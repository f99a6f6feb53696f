"""Sparsifiner's learned, unstructured attention (Wei et al., arXiv 2303.13755, section 3).

A guess of rank r chooses k keys for each query and head, and only these are computed. With narrow
queries q' and keys k', mixtures P of all keys and a basis B ``[r, N]``, cut at a threshold::

    S_i   = softmax(q'_i . (P^T k') / sqrt(H)) abs(B)      [N], the guess; its k largest are kept
    out_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

The first token, the class, attends to all. sqrt(H), of the number of heads, is the released code's.
The choice has no gradient: P, B and the narrow projections learn from the guess, which is returned
beside the output for a loss against dense attention. ``fold`` makes nodes of heads, which have a
pattern each. At a quarter of all pairs this takes about as long as dense attention on a CPU.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import fold, top_k, unfold

PATTERN = "for each head and query the best 50 keys of 197; the class token to all"
OPERATOR = "neighborhood_attention"


class SparsifinerAttention(nn.Module):
    """x ``[N, C]``, a class token and the tokens of one image -> ``[N, C]``, ``[H, N - 1, N]``."""

    def __init__(self, dim: int, heads: int, tokens: int, k: int, rank: int, threshold: float):
        super().__init__()
        self.heads, self.k, self.threshold = heads, k, threshold
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        sizes = dim // heads, dim // heads // 2
        self.narrow_q, self.narrow_k = nn.Linear(*sizes), nn.Linear(*sizes)
        self.mix, self.basis = (nn.Parameter(0.02 * torch.randn(tokens, rank)) for _ in "PB")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, D]
        mixed = torch.einsum("nhd,nr->hdr", self.narrow_k(k), self.mix)
        cheap = self.narrow_q(q[1:]).transpose(0, 1) @ mixed  # [H, N - 1, r]
        basis = nn.functional.threshold(self.basis.abs(), self.threshold, 0.0)
        guess = (cheap * self.heads**-0.5).softmax(-1) @ basis.T  # [H, N - 1, N]
        out = neighborhood_attention(fold(q), fold(k), fold(v), pattern(guess, self.k))
        return self.out(unfold(out, self.heads).flatten(1)), guess


def pattern(guess: Tensor, k: int) -> Graph:
    """A graph for each head: row 0 attends to all, each other row to its k largest of the guess."""
    heads, rows, n = guess.shape
    j, i = top_k(guess, k).edge_index
    i = i + i // rows + 1  # behind the class token of its head
    ptr = torch.arange(heads + 1, device=guess.device) * n
    first, every = ptr[:-1].repeat_interleave(n), torch.arange(heads * n, device=guess.device)
    edges = torch.stack([torch.cat([every, j]), torch.cat([first, i])])
    return Graph.from_edge_index(edges, heads * n, graph_ptr=ptr)


def paper_size() -> tuple[Graph, int, int]:
    """DeiT-S on an image of 224 x 224, a quarter of the keys; the guess is drawn."""
    guess = torch.rand(6, 196, 197, generator=torch.Generator().manual_seed(0))
    return pattern(guess, 50), 1, 64


if __name__ == "__main__":
    block = SparsifinerAttention(32, heads=4, tokens=17, k=5, rank=3, threshold=0.0)
    print(f"Sparsifiner: 5 keys of 17 -> {list(block(torch.randn(17, 32))[0].shape)}")
