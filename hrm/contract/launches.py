"""Operators that a task issues, views included; a test counts the executor's.

Those a request are of attention that goes request by request: a profile says what they cost where
it does.
"""

from typing import Final

PRE_ATTENTION_LAUNCHES: Final = 33
FUSED_PRE_ATTENTION_LAUNCHES: Final = 4
ATTENTION_LAUNCHES_PER_TASK: Final = 11
ATTENTION_LAUNCHES_PER_REQUEST: Final = 4
POST_ATTENTION_LAUNCHES: Final = 20
FUSED_POST_ATTENTION_LAUNCHES: Final = 8
ROUTING_LAUNCHES: Final = 8
LAUNCHES_PER_EXPERT: Final = 14
GROUPED_EXPERTS_LAUNCHES: Final = 37  # of all experts of a layer in one grouped GEMM a matrix
GROUPED_CAPABILITIES: Final = (9, 10)  # of CUDA devices, major; elsewhere torch's grouped GEMM reads its offsets back
GROUPED_DTYPE: Final = "bfloat16"  # that it takes, weights too
SAMPLE_LAUNCHES: Final = 17
# Whether the host's are fused: by the executor's own kernels, with which hosts are planned that nobody measured.
HOST_FUSES_OPERATORS: Final = True
