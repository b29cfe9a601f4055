"""The one place that imports Triton, which PyTorch brings along in builds for CUDA only.

A file of kernels does `from leangpt.system.triton import AVAILABLE, INTERPRETED, tl, triton` and
defines them under `if triton is not None:`; who calls them asks AVAILABLE first.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None
AVAILABLE = triton is not None and (INTERPRETED or torch.cuda.is_available())
