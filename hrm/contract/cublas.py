"""What cuBLAS may take of a GPU's memory: it chooses its kernels by that, so runs measure alike."""

from collections.abc import MutableMapping
from typing import Final

# torch allocates a workspace for each handle of cuBLAS's (one a thread) and stream: on Hopper four
# times this one, which is its default elsewhere. cuBLASLt's, given in KiB, may come with each call.
WORKSPACES: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "8320"}


def cap_workspaces(environment: MutableMapping[str, str]) -> None:
    """Bound what cuBLAS takes, which it reads when it is first used, unless the user says how."""
    for name, value in WORKSPACES.items():
        environment.setdefault(name, value)
