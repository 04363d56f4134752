"""One file a model family; nothing outside knows any of them by name."""

from typing import Any, Final

from executor.families.base import AbstractFamily
from executor.families.dbrx import Dbrx
from executor.families.mixtral import Mixtral
from executor.model.architecture import Architecture
from hrm.errors import ModelError

__all__ = ["FAMILIES", "AbstractFamily", "Architecture", "family_for"]

FAMILIES: Final[dict[str, AbstractFamily]] = {"mixtral": Mixtral(), "dbrx": Dbrx()}


def family_for(config: dict[str, Any], where: str) -> AbstractFamily:
    """The family of a config by its `model_type`; ModelError naming `where` if it is unknown."""
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(
            f"{where}: model_type", "<missing>" if name is None else name,
            f"must be one of {', '.join(FAMILIES)}", "use a Mixtral- or DBRX-shaped model",
        )  # fmt: skip
    return family
