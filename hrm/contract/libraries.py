"""What CUDA's libraries may take of a GPU and which attention they do, so that runs measure alike."""

from collections.abc import MutableMapping
from typing import Final

# torch allocates a workspace of cuBLAS's for each handle (one a thread) and stream: on Hopper four
# times this one, which is its default elsewhere. cuBLAS chooses its kernels by that. cuBLASLt's,
# given in KiB, may come with each call.
WORKSPACES: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "8320"}
# From 2.11 on torch prefers cuDNN's attention on Hopper and later, which builds a plan for every new length of keys
# in every thread, while all wait, and keeps them all.
ATTENTION: Final = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}


def settle_libraries(environment: MutableMapping[str, str]) -> None:
    """Say what libraries may take and do, which they read when they are first used, unless the user says how."""
    for name, value in {**WORKSPACES, **ATTENTION}.items():
        environment.setdefault(name, value)
