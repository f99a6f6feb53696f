"""The operators on a CPU: PyTorch's sparse primitives, O(N + E) working memory."""
