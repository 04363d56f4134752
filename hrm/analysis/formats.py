"""What narrower weights and caches bring: the best policy with each format."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.errors import ModelError
from hrm.formats import SCALED_KV_FORMATS, USUAL_PACKED, packed_format
from hrm.model_spec import packed_as
from hrm.search import Space

if TYPE_CHECKING:
    import pandas as pd


def formats_of(space: Space) -> list[Space]:
    """The space itself, and the same with nothing packed, with experts in each format, and with narrow KV caches.

    Formats that take none of the model's matrices are left out.
    """
    spaces = [space, replace(space, spec=space.spec.without_packing), *_packed(space)]
    spaces += [replace(space, kv_format=name) for name in SCALED_KV_FORMATS]
    return list({(one.spec, one.formats): one for one in spaces}.values())


def _packed(space: Space) -> Iterator[Space]:
    for name in USUAL_PACKED:
        form = packed_format(name)
        assert form is not None, name
        try:
            yield replace(space, spec=packed_as(space.spec, form))
        except ModelError:
            continue


def compare_formats(space: Space, *, on_point: OnPoint = None) -> "pd.DataFrame":
    """Search the best policy in each of `formats_of`, in that order.

    One row a format with the columns `weights` (which are packed and how, or the plain format), `kv_format`,
    `weight_bytes` (of the model), `change` (share by which tokens/s are more than in the first row) and those of
    `search_row`; where nothing fits, numbers are missing and `reason` says why.
    """
    rows: list[dict[str, Any]] = []
    for one, result in searched(formats_of(space), on_point):
        row = {
            "weights": one.spec.packing or one.formats.weights.name,
            "kv_format": one.formats.kv_cache.name,
            "weight_bytes": one.spec.bytes_in(one.formats.weights),
            **search_row(result, one.profile),
        }
        first, now = (rows or [row])[0]["tokens_per_s"], row["tokens_per_s"]
        rows.append({**row, "change": math.nan if first is None or now is None else now / first - 1})
    return table(rows, ("weights", "kv_format", "weight_bytes", "change"))
