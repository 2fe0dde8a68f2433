"""Tests, and what is said to PyTorch before they import it, in their own processes too."""

import os

os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each process tries the C++ compiler, for ten seconds
