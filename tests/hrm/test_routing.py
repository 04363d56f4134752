"""Measured routing: what is read of a run, and experts hit against drawing them."""

import json
from random import Random

import numpy as np
import pytest

from hrm.errors import ModelError
from hrm.routing import with_measured_routing
from tests.hrm.support import tiny_spec


def write(folder, routed_tokens):
    path = folder / "run.json"
    path.write_text(json.dumps({"schema": 1, "routed_tokens": routed_tokens, "totals": {}}))
    return path


def test_uniform_counts_change_nothing(tmp_path):
    spec = tiny_spec(num_experts=4, experts_per_token=2)
    measured = with_measured_routing(spec, write(tmp_path, [[50] * 4] * 4))
    assert measured.experts.frequencies == (0.5,) * 4
    tokens = np.array([1.0, 3.0, 3.0, 40.0])
    assert measured.experts_hit(tokens) == pytest.approx(spec.experts_hit(tokens))
    assert measured.experts_hit(7) == pytest.approx(spec.experts_hit(7))
    assert measured == spec  # a checkpoint is the same model however its tokens are routed


def test_experts_hit_are_those_of_tokens_drawn_with_the_frequencies(tmp_path):
    """One expert a token, so that drawing is a plain choice; two layers skewed differently."""
    spec = tiny_spec(num_experts=5, experts_per_token=1)
    counts = [[80, 5, 5, 5, 5], [5, 5, 80, 5, 5]]
    measured = with_measured_routing(spec, write(tmp_path, counts))
    rng, tokens, trials = Random(3), 6, 4000
    hit = sum(len(set(rng.choices(range(5), weights=counts[trial % 2], k=tokens))) for trial in range(trials))
    assert measured.experts_hit(tokens) == pytest.approx(hit / trials, rel=0.03)
    assert measured.experts_hit(tokens) < 0.75 * spec.experts_hit(tokens)


def test_a_folder_stands_for_its_run_json(tmp_path):
    write(tmp_path, [[1, 2, 3, 4]])
    spec = with_measured_routing(tiny_spec(), tmp_path)
    assert spec.experts.frequencies == pytest.approx((0.8, 0.6, 0.4, 0.2))


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ([[1, 2]], "2 experts in a layer"),
        ([], "no tokens"),
        ([[0, 0, 0, 0]], "no tokens"),
        ([[1, 2, 3, -4]], "must count"),
        ("many", "must be a list"),
        ([[1.5, 2, 3, 4]], "must be an integer"),
    ],
)
def test_counts_that_cannot_be_used_are_refused(tmp_path, counts, word):
    with pytest.raises(ModelError, match=word):
        with_measured_routing(tiny_spec(), write(tmp_path, counts))


def test_a_file_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for path in (tmp_path / "other.json", tmp_path / "missing.json"):
        with pytest.raises(ModelError, match=path.name):
            with_measured_routing(tiny_spec(), path)
