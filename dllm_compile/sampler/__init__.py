"""Sampling: from settings to the loop. ``step`` is one call in plain PyTorch, ``decode`` the loop around it."""
