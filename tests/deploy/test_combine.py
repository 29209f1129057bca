"""`utune-deploy combine` as a shell sees it: exit code, stdout, stderr, files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, vit: Backbone, random_delta: Any) -> Path:
    """A folder with the backbone and deltas: three of LoRA, one that does not fold, one of another size."""
    from utune_deploy.merge import methods
    from utune_deploy.merge.backbone import save
    from utune_deploy.merge.delta import save_delta

    root = tmp_path_factory.mktemp("combine")
    save(root / "backbone", vit)
    kinds = {
        "a": methods.lora(2),
        "b": methods.lora(3, at="attn.proj"),
        "c": methods.lora(1),
        "serial": methods.serial_adapter(2),
    }
    for number, (task, method) in enumerate(kinds.items()):
        delta = random_delta(vit, method, task=task, classes=3 + number, seed=number)
        save_delta(root / f"{task}.safetensors", delta)
    twin = random_delta(vit, methods.lora(2), task="a", classes=3, seed=9)
    save_delta(root / "twin.safetensors", twin)
    cropped = replace(twin, preprocessing=replace(twin.preprocessing, crop=0.5))
    save_delta(root / "cropped.safetensors", cropped)
    (root / "labels.txt").write_text("one\ntwo\n\nthree\n")
    return root


def arguments(files: Path, *deltas: str) -> list[object]:
    return [
        "combine",
        *(files / f"{d}.safetensors" for d in deltas),
        "--weights",
        files / "backbone",
    ]


def test_linear_says_what_it_did(cli: Any, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    said = cli(
        *arguments(files, "a", "b"), "--method", "linear", "--weight", 0.5, "--weight", 0.25,
        "--head", "b", "--task", "m", "-o", output,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith("task m from 2: method linear\n")
    lines = [line.split() for line in said.out.splitlines()]
    assert next(line for line in lines if line[0] == "a")[:3] == ["a", "0.5", "3"]
    assert next(line for line in lines if line[0] == "b")[:3] == ["b", "0.25", "3"]
    assert any(line[:2] == ["a,", "b"] and line[-1] == "-" for line in lines)  # no tensor in common
    assert f"wrote {output}" in said.out
    assert "cannot share a batch with other tasks" in said.err
    assert "--rank R keeps it low rank" in said.err


def test_the_combined_task_answers(
    cli: Any, files: Path, tmp_path: Path, alone: Any, images: Any, vit: Backbone
) -> None:
    """Cat and linear: one function of the pictures, in float32; merge takes the result on."""
    import timm
    import torch
    from safetensors.torch import load_file

    from utune_deploy.merge.delta import load_delta

    found = {}
    for method in ("cat", "linear"):
        output = tmp_path / f"{method}.safetensors"
        said = cli(
            *arguments(files, "a", "b", "c"), "--method", method,
            *("--head", "a", "--task", "m", "-o", output),
        )  # fmt: skip
        assert said.code == 0, said.err
        found[method] = alone(load_delta(output), images(2))
    size = np.abs(found["linear"]).max()
    np.testing.assert_allclose(found["cat"], found["linear"], rtol=0, atol=1e-5 * size)
    merged = tmp_path / "merged.safetensors"
    said = cli("merge", tmp_path / "cat.safetensors", "--weights", files / "backbone", "-o", merged)
    assert said.code == 0, said.err
    model = timm.create_model(
        vit.identity.architecture, **{**vit.identity.arguments, "num_classes": 3}
    )
    model.load_state_dict(load_file(merged))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(images(2))).numpy()
    np.testing.assert_allclose(logits, found["cat"], rtol=0, atol=1e-5 * size)


def test_a_combined_task_shares_a_batch(cli: Any, files: Path, tmp_path: Path) -> None:
    """Cat of two tasks beside a third, in one engine."""
    output = tmp_path / "m.safetensors"
    said = cli(
        *arguments(files, "a", "b"), "--method", "cat", "--head", "a", "--task", "m", "-o", output
    )
    assert said.code == 0, said.err
    assert said.err == ""
    said = cli(
        "export", output, files / "c.safetensors", "--weights", files / "backbone",
        "-o", tmp_path / "bundle", "--max-batch", 2, "--threads", 1,
    )  # fmt: skip
    assert said.code == 0, said.err


def test_json_and_truncation(cli: Any, files: Path, tmp_path: Path) -> None:
    common = ["--head", "a", "--task", "m", "-o", tmp_path / "m.safetensors"]
    said = cli(
        *arguments(files, "a", "b", "c"), "--method", "ties", "--density", 0.5, "--rank", 2,
        *common, "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.err == ""
    found = said.json
    assert found["settings"] == {"method": "ties", "density": "0.5", "rank": "2"}
    assert found["written"] is True
    assert found["shares_batch"] is True
    assert [share["weight"] for share in found["tasks"]] == [1.0, 1.0, 1.0]
    assert {(pair["one"], pair["other"]) for pair in found["pairs"]} == {
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    }
    assert len(found["truncations"]) == 6
    errors = [cut["error"] for cut in found["truncations"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < found["truncation_error"] <= errors[0]
    said = cli(
        *arguments(files, "a", "b", "c"), "--method", "svd", "--energy", 0.9, *common, "--force"
    )
    assert said.code == 0, said.err
    assert "energy 0.9" in said.out
    assert "all 6 together" in said.out


def test_the_order_and_the_run_do_not_matter(cli: Any, files: Path, tmp_path: Path) -> None:
    common = ["--method", "dare-ties", "--seed", 3, "--head", "b", "--task", "m"]
    for name, order in (("1", "abc"), ("2", "cab"), ("3", "abc")):
        assert cli(*arguments(files, *order), *common, "-o", tmp_path / name).code == 0
    assert len({(tmp_path / name).read_bytes() for name in "123"}) == 1


def test_labels_and_the_average_of_heads(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        *arguments(files, "a", "twin"), "--method", "linear", "--head", "average", "--task", "m",
        "--labels", files / "labels.txt", "-o", tmp_path / "m.safetensors", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.json["labels"] == ["one", "two", "three"]


def test_one_task_is_cut_to_a_low_rank(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        *arguments(files, "b"), "--method", "svd", "--rank", 1, "--task", "small",
        "-o", tmp_path / "m.safetensors", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert {cut["rank"] for cut in said.json["truncations"]} == {1}


@pytest.mark.parametrize("spoken", ["text", "json"])
def test_dry_run_writes_nothing(spoken: str, cli: Any, files: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in files.iterdir())
    said = cli(
        *arguments(files, "a", "b"), "--method", "cat", "--head", "a", "--task", "m",
        "-o", tmp_path / "m.safetensors", "--dry-run", *(["--json"] if spoken == "json" else []),
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    if spoken == "json":
        assert said.json["written"] is False
    else:
        assert "wrote" not in said.out
    assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in files.iterdir()) == before


@pytest.mark.parametrize(
    ("deltas", "options", "code", "sentence"),
    [
        ("ab", [], 2, "--head a or --head b or --head average"),
        ("ab", ["--head", "z"], 2, "no single one of the tasks"),
        ("ab", ["--head", "average"], 2, "heads of different classes"),
        ("ab", ["--head", "a", "--weight", "1"], 2, "the weights do not fit"),
        ("ab", ["--head", "a", "--density", "0.5"], 2, "a density means nothing"),
        ("ab", ["--head", "a", "--rank", "0"], 2, "the rank is out of range"),
        ("ab", ["--head", "a", "--rank", "2", "--energy", "0.5"], 2, "one of rank and energy"),
        ("ab", ["--head", "a", "--labels", "none.txt"], 2, "names of classes"),
        (["a", "serial"], ["--head", "a"], 2, "gelu between down and up"),
        (["a", "cropped"], ["--head", "average"], 2, "prepare their pictures differently"),
        (["a", "none"], ["--head", "a"], 2, "there is no such file"),
    ],
)
def test_errors_leave_nothing_written(
    deltas: Any, options: list[str], code: int, sentence: str, cli: Any, files: Path, tmp_path: Path
) -> None:
    said = cli(
        *arguments(files, *deltas), "--method", "linear", "--task", "m",
        "-o", tmp_path / "m.safetensors", *options,
    )  # fmt: skip
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert not list(tmp_path.iterdir())


def test_the_output_is_no_input_and_replaces_nothing(cli: Any, files: Path, tmp_path: Path) -> None:
    common = ["--method", "linear", "--head", "a", "--task", "m", "-o"]
    said = cli(*arguments(files, "a", "b"), *common, files / "a.safetensors", "--force")
    assert said.code == 2
    assert "one of the inputs" in said.err
    output = tmp_path / "m.safetensors"
    output.write_bytes(b"mine")
    said = cli(*arguments(files, "a", "b"), *common, output)
    assert said.code == 2
    assert "already exists" in said.err
    assert output.read_bytes() == b"mine"
