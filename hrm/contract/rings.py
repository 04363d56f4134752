"""How many turns each ring of buffers has: with that many in use, the next load waits for a reader."""

from typing import Final

WEIGHT_SLOTS: Final = 2  # layers whose streamed weights are on the GPU at once
EXPERT_SLOTS: Final = 2  # parts of a layer's experts that are on the GPU at once, where they stream in parts
BUFFERS: Final = 2  # KV and prefill buffers on the GPU: one in use, one in transfer
STAGING_PAGES: Final = 4  # pinned pages between pageable memory and the link
