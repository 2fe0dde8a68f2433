"""A guard for the device ``cuda`` in a build of torch that has none."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


def missing() -> str:
    """Why nothing can be lowered for CUDA here; empty where it can."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this build of torch has a device of its own"
    if find_spec("triton") is None:
        return "triton is missing"
    if shutil.which("g++") is None:
        return "g++ is missing"
    return ""


@cache
def load() -> None:
    """Build the guard, once for each version of torch, and register it."""
    name = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"dllm-guard-{os.getuid()}" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        of_torch = Path(torch.__file__).parent
        include = [f"-I{of_torch / 'include'}", f"-I{of_torch / 'include/torch/csrc/api/include'}"]
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            flags = ["-O1", "-shared", "-fPIC", "-std=c++20", *include, f"-L{of_torch / 'lib'}"]
            subprocess.run(["g++", *flags, "-o", made, SOURCE, "-lc10"], check=True)
            made.rename(library)  # whole, for whoever builds it beside us
    ctypes.CDLL(str(library))
    torch._C._ensureCUDADeviceGuardSet()
