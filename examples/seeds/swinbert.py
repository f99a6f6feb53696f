"""SwinBERT's learnable sparse mask of video tokens (Lin et al., arXiv 2111.13196, section 3).

Words of a caption and tokens of a video are one sequence. A word attends to itself, to the words
before it and to all of the video; a video token to video tokens, through a mask that is learned::

    out_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d) + b_ij) v_j
    b_ij  = -10^4 (1 - m_ij),   m_ij = sigmoid(w_ij), m_ii = 1,   for video tokens i and j, else 0

The mask is one for all heads, and a loss beside it takes the mean of m_ij. The factor 10^4 is
BERT's, and kept: a pair counts only where m_ij is within some 10^-3 of 1, and w gets no gradient
elsewhere. The released hard mask keeps pairs of m_ij >= 1/2: that is a graph of these, ``kept``.

While the mask is soft nearly all pairs are there, and dense attention with a float mask is the
better choice. The graph pays once the mask is hard and sparse.
"""

import torch
from torch import Tensor, nn

from fastgt import Graph, neighborhood_attention

PATTERN = "784 video tokens to each other under a soft mask; 50 words, causal, to all of them"
OPERATOR = "neighborhood_attention"


class SwinBERTAttention(nn.Module):
    """x ``[N, C]``, the words and then ``video`` tokens -> ``[N, C]``."""

    def __init__(self, dim: int, heads: int, video: int):
        super().__init__()
        self.heads, self.video = heads, video
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mask = nn.Parameter(torch.randn(video, video))

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # [N, H, D]
        j, i = graph.edge_index - (len(x) - self.video)  # words have negative numbers
        learned = (i >= 0) & (i != j)
        w = self.mask[i.clamp(min=0), j.clamp(min=0)]
        bias = torch.where(learned, -1e4 * torch.sigmoid(-w), 0.0)  # 1 - sigmoid(w), exactly
        bias = bias[:, None].expand(-1, self.heads)  # [E, H]
        return self.out(neighborhood_attention(q, k, v, graph, edge_bias=bias).flatten(1))


def pattern(words: int, video: int, kept: Tensor | None = None) -> Graph:
    """Who attends to whom; kept ``[video, video]``, boolean: the hard mask."""
    n = words + video
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:words, words:] = True
    mask[words:, :words] = False
    mask[words:, words:] = True if kept is None else kept | torch.eye(video, dtype=torch.bool)
    return Graph.from_dense(mask)


def paper_size() -> tuple[Graph, int, int]:
    """32 frames of 224 x 224 through Video Swin, and 50 words, in BERT-base."""
    return pattern(50, 784), 12, 64


if __name__ == "__main__":
    graph = pattern(4, 12)
    block = SwinBERTAttention(32, heads=4, video=12)
    print(f"SwinBERT: {graph.num_edges} edges -> {list(block(torch.randn(16, 32), graph).shape)}")
