"""What lies in memory for each request and token besides elements of the model's dtype."""

from typing import Final

KV_BLOCK_TOKENS: Final = 16  # a request's part of a KV cache is a whole number of such blocks
INTEGER_BYTES: Final = 8  # positions, rows, experts and counts are int64
NUMBERS_PER_REQUEST: Final = 5  # its position, row of the cache, length and the like, on a GPU
NUMBERS_PER_TOKEN: Final = 2  # a prompt's token: its position, and where its prompt ends
REQUEST_NUMBER_BYTES: Final = NUMBERS_PER_REQUEST * INTEGER_BYTES
TOKEN_NUMBER_BYTES: Final = NUMBERS_PER_TOKEN * INTEGER_BYTES
COUNT_BYTES: Final = INTEGER_BYTES  # of the tokens that an expert was sent
ROUTING_BYTES: Final = INTEGER_BYTES + 4  # a token's routed expert: which, and its float32 weight
LOGIT_BYTES: Final = 4  # logits are float32 whatever the dtype
