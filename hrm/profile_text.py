"""The YAML text of a GPU, a host or a machine, as people would write it."""

from dataclasses import fields, is_dataclass
from typing import Any, cast

from hrm.catalog import CatalogPart
from hrm.decoding import reads_as_text
from hrm.hardware import Source


def dump_profile(profile: CatalogPart) -> str:
    """The YAML text of a profile, defaults left out and plain figures on a line each."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Floats with an exponent where they are long, as data sheets have them."""

    def represent_float(dumper: Any, value: float) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:float", _float_text(value))

    def represent_text(dumper: Any, value: str) -> Any:
        quote = None if reads_as_text(value) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=quote)

    Dumper.add_representer(float, represent_float)
    Dumper.add_representer(str, represent_text)
    return yaml.dump(_to_plain(profile), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100)


def _float_text(value: float) -> str:
    """The shortest text that YAML reads back as the same float."""
    if 1e-3 <= abs(value) < 1e5 or value == 0:
        return repr(value)
    texts = (f"{value:.{digits}e}" for digits in range(1, 18))
    mantissa, _, exponent = next(t for t in texts if float(t) == value).partition("e")
    return f"{mantissa}e{int(exponent):+d}"


def _to_plain(node: Any) -> Any:
    if isinstance(node, Source):
        return node.value
    if is_dataclass(node) and not isinstance(node, type):
        plain: dict[str, Any] = {}
        for item in fields(node):
            value = getattr(node, item.name)
            default = item.default_factory() if callable(item.default_factory) else item.default
            if item.name == "schema" or value != default:
                plain[item.name] = _to_plain(value)
        return plain
    if isinstance(node, dict):
        pairs = cast("dict[Any, Any]", node)
        return {key: _to_plain(value) for key, value in pairs.items()}
    if isinstance(node, tuple):
        return [_to_plain(item) for item in cast("tuple[Any, ...]", node)]
    return node
