"""What was measured of a schedule."""

from dataclasses import dataclass
from typing import Any

import msgspec

from hrm.numeric import Spread
from hrm.validate import Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One schedule, as its repeat of median tokens/s was; `least` and `most` span all repeats.

    `decode_step_s` spreads over its decode steps, and `decode_bytes_per_s` is what each lane moved
    a second while it was at work. `attention_bytes_per_s` is what the CPU read of the cache while
    it attended, if it did. `ratio` is to the first schedule's tokens/s. `bound_tokens_per_s` is the
    prediction with all lanes overlapping perfectly; `validation` lays the whole repeat beside its
    prediction. `tokens_crc32` are checksums of the tokens of all repeats, each once: schedules of one
    policy that are right have the same one.
    """

    schedule: str
    tokens_per_s: float
    least_tokens_per_s: float
    most_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_s: Spread
    prefill_busy_share: dict[str, float]
    decode_busy_share: dict[str, float]
    decode_bytes_per_s: dict[str, float]
    attention_bytes_per_s: float | None
    ratio: float
    predicted_tokens_per_s: float
    bound_tokens_per_s: float
    load_s: float
    tokens_crc32: tuple[int, ...]
    validation: Validation

    def to_json(self) -> dict[str, Any]:
        """All of it, peak and planned memory among it."""
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return msgspec.to_builtins({**fields, "validation": self.validation.to_json()})
