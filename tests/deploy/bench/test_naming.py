from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from utune_deploy.deploy.bench.naming import subject_names


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["a/tasks8", "a/tasks64", "a/fused"], ["tasks8", "tasks64", "fused"]),
        (["old/pets", "new/pets", "new/cats"], ["old/pets", "new/pets", "cats"]),
        (["x/old/pets", "x/pets"], ["old/pets", "x/pets"]),
        (["pets", "pets", "pets"], ["pets", "pets, again", "pets, again (3)"]),
        (["a/pets", "b/pets", "a/pets"], ["a/pets", "b/pets", "a/pets, again"]),
    ],
)
def test_bundles_keep_their_names_and_are_told_apart_by_their_paths(paths, wanted, tmp_path):
    bundles = [SimpleNamespace(name=Path(p).name, path=tmp_path / p) for p in paths]
    assert subject_names(bundles) == wanted


def test_a_bundle_whose_folder_has_another_name_says_both(tmp_path):
    bundles = [SimpleNamespace(name="pets", path=tmp_path / p) for p in ("monday", "tuesday")]
    assert subject_names(bundles) == ["pets (monday)", "pets (tuesday)"]
