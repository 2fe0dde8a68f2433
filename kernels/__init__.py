"""One operation a file: a reference in PyTorch, and for some a Triton kernel."""
