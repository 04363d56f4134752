"""What the maths must know of a model besides its dimensions; made by `executor.families`."""

from dataclasses import dataclass
from enum import StrEnum

from hrm.model_spec import ModelSpec


class Norm(StrEnum):
    """How hidden states are normalised; neither form has a bias."""

    RMS = "rms"
    LAYER = "layer"


class Scores(StrEnum):
    """What a router makes of its logits: probabilities of one choice, or of each expert by itself."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How experts are chosen: those with the greatest scores, which become a token's weights.

    The weights are divided by their `norm`-norm (1 makes them sum to one; None leaves them alone).
    """

    scores: Scores = Scores.SOFTMAX
    norm: float | None = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder with grouped-query attention, rotary embedding and routed gated-SiLU experts.

    `clip_qkv` bounds queries, keys and values before the rotary embedding. `window` is how far
    attention reaches back; no request may have more tokens, for windows are not computed.
    """

    spec: ModelSpec
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    clip_qkv: float | None = None
    router: Router = Router()
    max_position_embeddings: int = 4096
    window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def most_positions(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        most = self.max_position_embeddings
        return most if self.window is None else min(most, self.window)
