"""How evenly tokens are routed to experts, as a run counted it.

Plans assume uniform routing unless they are told better: where some experts are favoured, a
micro-batch reaches fewer of them, and less weight is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hrm.decoding import read_json
from hrm.errors import ModelError, ProfileError
from hrm.model_spec import ModelSpec
from hrm.strict import decode_strictly

_REMEDY: Final = "give the run.json of an executor run with this model"


@dataclass(frozen=True, slots=True)
class _Counts:
    """The part of a run.json that is read; the file holds more."""

    routed_tokens: list[list[int]]


def with_measured_routing(spec: ModelSpec, path: Path) -> ModelSpec:
    """The model with the routing that a run counted, from its run.json or folder.

    Of every layer the experts are sorted by how often they are chosen, and the shares are means
    over the layers: which expert it is makes no difference to what is read. Raises ModelError if
    the file has no counts, or counts of another model.
    """
    path = path / "run.json" if path.is_dir() else path
    where = f"--routing {path}"
    plain = read_json(path, "a run.json with routed_tokens", ModelError, where=where, remedy=_REMEDY)
    try:
        layers = decode_strictly(plain, _Counts, where, other_keys=True).routed_tokens
    except ProfileError as error:
        raise ModelError(error.where, error.value, error.rule, _REMEDY) from error
    counted = [sorted(layer, reverse=True) for layer in layers if sum(layer) > 0]
    if not counted:
        raise ModelError(f"--routing {path}: routed_tokens", "<no tokens>", "must count some tokens", _REMEDY)
    for counts in counted:
        if len(counts) != spec.num_experts or counts[-1] < 0:
            raise ModelError(
                f"--routing {path}: routed_tokens",
                f"<{len(counts)} experts in a layer>",
                f"must count the {spec.num_experts} experts of {spec.name}",
                _REMEDY,
            )
    share = spec.experts_per_token / len(counted)
    frequencies = tuple(
        share * sum(counts[rank] / sum(counts) for counts in counted) for rank in range(spec.num_experts)
    )
    return spec.with_frequencies([min(1.0, f) for f in frequencies])
