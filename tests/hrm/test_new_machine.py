"""A GPU, a host and a machine that are added from outside, as CONTRIBUTING says: a YAML file each."""

import shutil

import pytest

from hrm import catalog

pytestmark = pytest.mark.usefixtures("rough_bounds")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the catalog, to be added to."""
    copy = shutil.copytree(catalog.profile_folder(), tmp_path / "hardware_profiles")
    monkeypatch.setattr(catalog, "profile_folder", lambda: copy)
    return copy


@pytest.mark.parametrize(("kind", "like"), [("gpus", "L4"), ("hosts", "gcp-g2-standard-48"), ("machines", "GB10")])
def test_a_file_is_all_that_it_takes(hrm, folder, kind, like):
    _, nearest, _ = hrm("profiles", like)
    new = nearest.replace(f"name: {like}", "name: Toy-9000")
    assert new != nearest
    (folder / kind / "Toy-9000.yaml").write_text(new, encoding="utf-8")
    assert hrm("profiles", "toy 9000") == (0, new, "")
    _, listed, _ = hrm("profiles")
    assert "Toy-9000" in listed


@pytest.mark.usefixtures("coarse_searches")
def test_they_are_planned_for_by_any_spelling_and_alias(hrm_json, folder, hrm, monkeypatch):
    for kind, like, name in (("gpus", "L4", "Toy-9000"), ("hosts", "gcp-g2-standard-48", "Toy-Rack")):
        _, nearest, _ = hrm("profiles", like)
        (folder / kind / f"{name}.yaml").write_text(nearest.replace(f"name: {like}", f"name: {name}"))
    monkeypatch.setitem(catalog._ALIASES, "Plaything", "Toy-9000")
    asked = ("search", "--model", "olmoe-1b-7b", "--requests", 8, "--host", "toy-rack")
    one, other = (hrm_json(*asked, "--gpus", gpus) for gpus in ("2xtoy9000", "2xplaything"))
    assert one["machine"] == other["machine"] == "2xToy-9000 on Toy-Rack"
    like = hrm_json(*asked[:-1], "gcp-g2-standard-48", "--gpus", "2xL4")
    assert one["predicted"]["tokens_per_s"] == like["predicted"]["tokens_per_s"] > 0
