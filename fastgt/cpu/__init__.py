"""The operators on a CPU: compiled C++ kernels, and what calls them."""
