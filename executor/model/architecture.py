"""What the maths must know of a model besides its dimensions; made by `executor.families`."""

from dataclasses import dataclass
from enum import StrEnum

from hrm.model_spec import ModelSpec


class Norm(StrEnum):
    """How hidden states are normalised; neither form has a bias."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder with grouped-query attention, rotary embedding and routed gated-SiLU experts.

    `clip_qkv` bounds queries, keys and values before the rotary embedding. A token's weights for
    its experts are their router probabilities divided by the `router_norm`-norm of them (1 makes
    them sum to one; None leaves them alone). `window` is how far attention reaches back; no request
    may have more tokens, for windows are not computed.
    """

    spec: ModelSpec
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    clip_qkv: float | None = None
    router_norm: float | None = 1.0
    max_position_embeddings: int = 4096
    window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def most_positions(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        most = self.max_position_embeddings
        return most if self.window is None else min(most, self.window)
