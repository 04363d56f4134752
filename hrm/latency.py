"""What one request waits for: its first token and each of the others; and limits on both."""

from collections.abc import Sequence
from dataclasses import dataclass

from hrm.errors import PolicyError
from hrm.units import at_least_seconds as at_least
from hrm.units import format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Waiting times of a full batch's requests, in seconds; a job of one batch has no others.

    Time to first token counts from the start of the request's batch, not from that of the job: all
    prompts of a batch are prefilled layer by layer, so first tokens come together, near the end of
    prefill. `last_ttft_s` is when the last request has its own, `mean_ttft_s` when requests have
    it on average. `tpot_s` is the time per output token after that, a decode step on average; None
    if prefill generates all there is.
    """

    mean_ttft_s: float
    last_ttft_s: float
    tpot_s: float | None

    @staticmethod
    def of_batch(
        *,
        prefill_s: Sequence[float],
        num_stages: int,
        gpu_s_a_layer: float,
        chunks: int,
        decode_s: float,
        decode_steps: int,
    ) -> "Latency":
        """Those of a batch that goes through stages with such prefills, the slowest of which decodes for so long.

        Where the prefills are of one stage, it stands for all `num_stages`. As many batches begin one after
        the other, and the last of them waits longest: wherever a stage is slower than the first, they
        queue. First tokens come chunk by chunk in the last layer, whose prefill takes the GPU
        `gpu_s_a_layer`.
        """
        alike = num_stages / len(prefill_s)
        last_ttft_s = alike * sum(prefill_s) + (num_stages - 1) * (max(prefill_s) - prefill_s[0])
        spread_s = min(gpu_s_a_layer * (1 - 1 / chunks), prefill_s[-1])
        return Latency(
            mean_ttft_s=last_ttft_s - spread_s / 2,
            last_ttft_s=last_ttft_s,
            tpot_s=num_stages * decode_s / decode_steps if decode_steps else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimits:
    """The longest that requests may wait, in seconds: every first token, and a token on average."""

    max_ttft_s: float | None = None
    max_tpot_s: float | None = None

    def overshoot(self, latency: Latency) -> tuple[float, float]:
        """By which factors the waiting times are longer than allowed; 1 where they are not."""
        return (_factor(latency.last_ttft_s, self.max_ttft_s), _factor(latency.tpot_s, self.max_tpot_s))

    def check(self, latency: Latency) -> None:
        """Raise PolicyError if something takes longer than allowed."""
        for flag, allowed_s, what, seconds in (
            ("--max-ttft", self.max_ttft_s, "the last first token of a batch", latency.last_ttft_s),
            ("--max-tpot", self.max_tpot_s, "a token after the first", latency.tpot_s),
        ):
            if allowed_s is not None and seconds is not None and seconds > allowed_s:
                raise PolicyError(
                    flag,
                    f"<{format_seconds(allowed_s)}>",
                    f"must hold, and under this policy {what} takes {format_seconds(seconds)}",
                    f"allow {flag} {at_least(seconds)}, or ask hrm search for a policy within it",
                )

    def are_met(self, latency: Latency) -> bool:
        """Whether nothing takes longer than allowed."""
        return self.overshoot(latency) == (1.0, 1.0)


NO_LIMITS = LatencyLimits()


def _factor(seconds: float | None, most_s: float | None) -> float:
    return 1.0 if seconds is None or most_s is None else max(1.0, seconds / most_s)
