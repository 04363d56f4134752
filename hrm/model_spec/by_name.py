"""The models that are known by name."""

from collections import UserDict
from collections.abc import Iterator
from typing import Final

from hrm.model_spec.built_in import PUBLISHED
from hrm.model_spec.families import decoder_keys, spec_as_stored
from hrm.model_spec.spec import ModelSpec


class _Models(UserDict[str, ModelSpec]):
    """Models by name, each made of its published config when it is first asked for."""

    def __missing__(self, name: str) -> ModelSpec:
        spec = self.data[name] = spec_as_stored(decoder_keys(PUBLISHED[name], f"{name}/config.json"))
        return spec

    def __contains__(self, name: object) -> bool:
        return name in PUBLISHED or name in self.data

    def __iter__(self) -> Iterator[str]:
        return iter({**PUBLISHED, **self.data})

    def __len__(self) -> int:
        return len({**PUBLISHED, **self.data})


BUILT_IN_MODELS: Final = _Models()
