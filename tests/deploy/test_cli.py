"""Every verb from files to files, as a shell sees it: exit code, stdout, stderr."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from utune_deploy.deploy.cli import main, main_group
from utune_deploy.deploy.verbs import GROUPS
from utune_deploy.export.bundle import MANIFEST, open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

VERBS = [verb for verbs in GROUPS.values() for verb in verbs]
TASKS = ("lora", "dual")


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, vit: Backbone, deltas: dict[str, Delta], picture: Any
) -> Path:
    """A folder with the backbone, the deltas, pictures and a tensor."""
    from utune_deploy.merge.backbone import save
    from utune_deploy.merge.delta import save_delta

    root = tmp_path_factory.mktemp("files")
    save(root / "backbone", vit)
    for task in ("lora", "dual", "prefix"):
        save_delta(root / f"{task}.safetensors", deltas[task])
    (root / "pictures").mkdir()
    for number in range(3):
        (root / "pictures" / f"{number}.png").write_bytes(picture(number))
    noise = np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32)
    np.save(root / "batch.npy", noise)
    return root


@pytest.fixture(scope="module")
def bundle(files: Path) -> Path:
    """Two tasks, exported by the command line."""
    with suppress(SystemExit):
        main([
            "-q", "export", str(files / "lora.safetensors"), str(files / "dual.safetensors"),
            "--weights", str(files / "backbone"), "-o", str(files / "bundle"), "--max-batch", "4",
            "--threads", "1",
        ])  # fmt: skip
    return files / "bundle"


@pytest.fixture(scope="module")
def wrong(files: Path, bundle: Path) -> Path:
    """The bundle with a task's tensor zeroed in the engine, and the digest to match."""
    folder = files / "wrong"
    shutil.copytree(bundle, folder)
    model = onnx.load_from_string((folder / "model.onnx").read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name == "bank/blocks.1.attn.qkv/lora.0/up":
            value = np.zeros_like(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    manifest["files"]["model.onnx"]["sha256"] = digest
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


# help


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_fits_a_terminal(flag: str, cli: Any) -> None:
    said = cli(flag)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for verb in VERBS:
        assert any(line.strip().startswith(f"{verb} ") for line in lines)
    assert "Exit codes: 0 ok" in said.out


def test_no_verb_shows_the_help(cli: Any) -> None:
    said = cli()
    assert "Usage: utune-deploy" in said.out + said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, cli: Any) -> None:
    said = cli(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"Usage: utune-deploy {verb}")
    assert max(map(len, said.out.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    command = main_group.get_command(click.Context(main_group), verb)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{verb} {parameter.opts}"


def test_the_version_lists_the_libraries(cli: Any) -> None:
    said = cli("--version")
    assert (said.code, said.err) == (0, "")
    names = [line.split()[0] for line in said.out.splitlines()]
    assert {"python", "utune-deploy", "torch", "onnxruntime-gpu", "tensorrt"} <= set(names)


# merge


def test_merge_writes_a_checkpoint_that_timm_loads(
    cli: Any, files: Path, tmp_path: Path, vit: Backbone, deltas: Any, alone: Any, images: Any
) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    output, report = tmp_path / "merged.safetensors", tmp_path / "report.json"
    said = cli(
        "merge", files / "lora.safetensors", "--weights", files / "backbone",
        "-o", output, "--report", report,
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    assert "task lora folds exactly: changed 3 tensors" in said.out
    assert f"wrote {output}" in said.out
    arguments = {**vit.identity.arguments, "num_classes": len(deltas["lora"].labels)}
    model = timm.create_model(vit.identity.architecture, **arguments).eval()
    model.load_state_dict(load_file(output))
    with torch.no_grad():
        found = model(torch.from_numpy(images(2))).numpy()
    wanted = alone(deltas["lora"], images(2))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    written = json.loads(report.read_text())
    assert written["changed_tensors"] == len(written["tensors"]) == 3


def test_merge_speaks_json_and_warns_on_stderr(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        "merge", files / "lora.safetensors", "--weights", files / "backbone",
        "-o", tmp_path / "m.safetensors", "--dtype", "bf16", "--json",
    )  # fmt: skip
    assert said.code == 0
    assert said.json["dtype"] == "bfloat16"
    assert said.json["written"] is True
    assert said.err == "" or said.err.startswith("warning: ")
    assert bool(said.err) == (said.json["warning"] is not None)


def test_merge_dry_run_writes_nothing(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        "merge", files / "lora.safetensors", "--weights", files / "backbone",
        "-o", tmp_path / "m.safetensors", "--report", tmp_path / "r.json", "--dry-run",
    )  # fmt: skip
    assert said.code == 0
    assert "would change 3 tensors" in said.out
    assert "wrote" not in said.out
    assert not list(tmp_path.iterdir())


def test_merge_of_what_does_not_fold_is_refused(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        "merge", files / "dual.safetensors", "--weights", files / "backbone",
        "-o", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: task dual cannot be merged exactly")
    assert "--mode parallel" in said.err
    assert not list(tmp_path.iterdir())


def test_merge_replaces_a_file_only_when_it_is_told_to(
    cli: Any, files: Path, tmp_path: Path
) -> None:
    output = tmp_path / "m.safetensors"
    output.write_bytes(b"mine")
    arguments = ("merge", files / "lora.safetensors", "--weights", files / "backbone", "-o", output)
    said = cli(*arguments)
    assert said.code == 2
    assert "the output already exists" in said.err
    assert output.read_bytes() == b"mine"
    assert cli(*arguments, "--force").code == 0
    assert output.read_bytes() != b"mine"


# export


def test_export_writes_a_bundle(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert [task.name for task in opened.tasks] == list(TASKS)
    assert (opened.mode, opened.bank, opened.engine.max_batch) == ("multi", "constants", 4)


def test_export_says_what_it_did_and_why(cli: Any, files: Path, tmp_path: Path) -> None:
    said = cli(
        "export", files / "lora.safetensors", "--weights", files / "backbone", "-o", tmp_path / "b",
        "--threads", 1, "--max-batch", 2, "--images", files / "pictures", "--name", "served",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("mode merged: every branch folds exactly")
    assert "all branches fold exactly" in said.out
    assert "graph passes: flat_heads 3" in said.out
    assert f"wrote {tmp_path / 'b'} (merged, 1 task, engine" in said.out
    names = [c["name"] for c in open_bundle(tmp_path / "b").check["comparisons"]]
    assert any("real images" in name for name in names)
    assert open_bundle(tmp_path / "b").name == "served"


@pytest.mark.parametrize("spoken", ["text", "json"])
def test_export_dry_run_prints_the_plan_and_writes_nothing(
    spoken: str, cli: Any, files: Path, tmp_path: Path
) -> None:
    before = listing(files)
    said = cli(
        "export", files / "lora.safetensors", files / "dual.safetensors",
        "--weights", files / "backbone", "-o", tmp_path / "b", "--bank", "inputs", "--dry-run",
        *(["--json"] if spoken == "json" else []),
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    if spoken == "json":
        assert (said.json["mode"], said.json["bank"]) == ("multi", "inputs")
        assert [task["task"] for task in said.json["tasks"]] == list(TASKS)
    else:
        assert said.out.startswith("mode multi: gather form")
    assert not list(tmp_path.iterdir())
    assert listing(files) == before


def test_export_refuses_an_output_that_is_there_and_leaves_it(
    cli: Any, files: Path, bundle: Path
) -> None:
    before = listing(bundle)
    said = cli("export", files / "lora.safetensors", "--weights", files / "backbone", "-o", bundle)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: the output already exists")
    assert listing(bundle) == before


def test_export_takes_a_named_architecture_and_a_file_of_weights(
    cli: Any, files: Path, tmp_path: Path, vit: Backbone
) -> None:
    arguments = [f"{key}={value}" for key, value in vit.identity.arguments.items()]
    said = cli(
        "export", files / "lora.safetensors", "--backbone", vit.identity.architecture,
        *(part for text in arguments for part in ("--backbone-arg", text)),
        "--weights", files / "backbone" / "backbone.safetensors", "-o", tmp_path / "b", "--dry-run",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith("mode merged")


@pytest.mark.parametrize(
    ("text", "code"), [("img_size", 2), ("=3", 2), ("img_size=64", 4), ("no_such_argument=1", 2)]
)
def test_export_refuses_arguments_that_the_backbone_does_not_take(
    text: str, code: int, cli: Any, files: Path, tmp_path: Path, vit: Backbone
) -> None:
    arguments = [f"{key}={value}" for key, value in vit.identity.arguments.items()]
    said = cli(
        "export", files / "lora.safetensors", "--backbone", vit.identity.architecture,
        *(part for given in (*arguments, text) for part in ("--backbone-arg", given)),
        "--weights", files / "backbone" / "backbone.safetensors", "-o", tmp_path / "b", "--dry-run",
    )  # fmt: skip
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith("error: ")


# add


def test_add_writes_a_bundle_of_more_tasks_with_the_same_engine(
    cli: Any, files: Path, tmp_path: Path, vit: Backbone, bundles: Any, random_delta: Any
) -> None:
    from utune_deploy.merge import methods
    from utune_deploy.merge.delta import save_delta

    save_delta(tmp_path / "later.safetensors", random_delta(vit, methods.lora(2), task="later"))
    arguments = (
        "add", bundles("inputs").path, tmp_path / "later.safetensors",
        "--weights", files / "backbone", "-o", tmp_path / "grown",
    )  # fmt: skip
    said = cli(*arguments, "--images", files / "pictures")
    assert (said.code, said.err) == (0, "")
    assert said.out == f"wrote {tmp_path / 'grown'}: later added, 7 tasks, the same engine\n"
    assert open_bundle(tmp_path / "grown").read_engine() == bundles("inputs").read_engine()
    again = cli(*arguments)
    assert (again.code, again.out) == (2, "")
    forced = cli(*arguments, "--force", "--json")
    assert forced.json["tasks"][-1] == "later"


def test_add_refuses_a_bank_of_constants(
    cli: Any, files: Path, bundle: Path, tmp_path: Path
) -> None:
    said = cli(
        "add", bundle, files / "prefix.safetensors",
        "--weights", files / "backbone", "-o", tmp_path / "grown",
    )  # fmt: skip
    assert (said.code, said.out) == (2, "")
    assert "only where the bank is an input" in said.err
    assert not list(tmp_path.iterdir())


# check


def test_check_passes_claim_by_claim(cli: Any, files: Path, bundle: Path) -> None:
    said = cli(
        "check", bundle, files / "dual.safetensors", files / "lora.safetensors",
        "--weights", files / "backbone", "--threads", 1, "--images", files / "pictures",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    rows = [line.split()[0] for line in said.out.splitlines()[1:-1]]
    assert set(rows) == {"pass"}
    assert said.out.splitlines()[-1] == f"{bundle}: all {len(rows)} comparisons passed"


def test_check_fails_a_wrong_engine_with_code_3_and_still_says_all(
    cli: Any, files: Path, wrong: Path
) -> None:
    arguments = (
        "check", wrong, files / "lora.safetensors", files / "dual.safetensors",
        "--weights", files / "backbone", "--threads", 1,
    )  # fmt: skip
    said = cli(*arguments, "--json")
    assert said.code == 3
    assert said.json["passed"] is False
    assert not said.json["comparisons"][0]["passed"]
    assert said.err.startswith("error: the bundle does not answer as its tasks do in torch")
    spoken = cli(*arguments)
    assert spoken.code == 3
    assert "FAIL" in spoken.out
    assert "comparisons passed" not in spoken.out


def test_check_wants_every_delta_of_the_bundle(cli: Any, files: Path, bundle: Path) -> None:
    said = cli("check", bundle, files / "lora.safetensors", "--weights", files / "backbone")
    assert (said.code, said.out) == (4, "")
    assert "the deltas of some tasks are not given" in said.err


def test_check_says_which_delta_is_not_there(cli: Any, files: Path, bundle: Path) -> None:
    said = cli("check", bundle, files / "none.safetensors", "--weights", files / "backbone")
    assert (said.code, said.out) == (2, "")
    assert "there is no such file" in said.err
    assert "none.safetensors" in said.err
    said = cli(
        "check", bundle, files / "lora.safetensors", "--weights", files / "backbone", "--seed", -1
    )
    assert said.code == 2
    assert "--seed" in said.err


# predict


def test_predict_labels_pictures_each_with_its_own_task(
    cli: Any, files: Path, bundle: Path, deltas: Any
) -> None:
    pictures = sorted((files / "pictures").iterdir())
    said = cli(
        "predict", bundle, *pictures, "--task", "lora", "--task", "dual", "--task", "lora", "--json"
    )
    assert (said.code, said.err) == (0, "")
    assert [row["task"] for row in said.json] == ["lora", "dual", "lora"]
    assert [row["input"] for row in said.json] == [str(path) for path in pictures]
    for row in said.json:
        assert {best["label"] for best in row["top"]} <= set(deltas[row["task"]].labels)
        scores = [best["score"] for best in row["top"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3


def test_predict_writes_the_logits_of_a_tensor(
    cli: Any, files: Path, bundle: Path, tmp_path: Path, deltas: Any, alone: Any
) -> None:
    output = tmp_path / "logits.npy"
    said = cli(
        "predict",
        bundle,
        "--tensor",
        files / "batch.npy",
        "--task",
        "dual",
        "-o",
        output,
        "--top",
        1,
    )
    assert (said.code, said.err) == (0, "")
    assert len(said.out.splitlines()) == 1 + 5  # more rows than the engine's largest batch
    assert f"{files / 'batch.npy'}[4]" in said.out
    logits = np.load(output)
    wanted = alone(deltas["dual"], np.load(files / "batch.npy"))
    assert logits.shape == (5, 5)
    np.testing.assert_allclose(logits[:, :3], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    again = cli("predict", bundle, "--tensor", files / "batch.npy", "--task", "dual", "-o", output)
    assert (again.code, again.out) == (2, "")
    forced = ("--tensor", files / "batch.npy", "--task", "dual", "-o", output, "--force")
    assert cli("predict", bundle, *forced).code == 0


def test_predict_reads_safetensors_as_it_reads_npy(
    cli: Any, files: Path, bundle: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    save_file({"images": np.load(files / "batch.npy")}, tmp_path / "batch.safetensors")
    said = [
        cli("predict", bundle, "--tensor", path, "--task", "lora", "--json").json
        for path in (files / "batch.npy", tmp_path / "batch.safetensors")
    ]
    assert [row["top"] for row in said[0]] == [row["top"] for row in said[1]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name pictures or --tensor"),
        (
            ["pictures/0.png", "--tensor", "batch.npy", "--task", "lora"],
            "name pictures or --tensor",
        ),
        (["pictures/0.png"], "it is not said which task each row asks"),
        (
            ["pictures/0.png", "--task", "lora", "--task", "dual"],
            "it is not said which task each row asks",
        ),
        (["pictures/0.png", "--task", "birds"], "unknown task"),
        (["pictures/9.png", "--task", "lora"], "there is no such picture"),
        (["batch.npy", "--task", "lora"], "the file is no picture"),
        (["--tensor", "pictures/0.png", "--task", "lora"], "the tensor cannot be read"),
        (["--tensor", "nothing.npy", "--task", "lora"], "the tensor cannot be read"),
        (["--tensor", "lora.safetensors", "--task", "lora"], "the file does not hold one tensor"),
        (["--tensor", "flat.npy", "--task", "lora"], "the tensor is no preprocessed batch"),
        (["--tensor", "small.npy", "--task", "lora"], ""),
        (["pictures/0.png", "--every-task"], "the bundle has no engine that answers every task"),
        (["pictures/0.png", "--every-task", "--task", "lora"], "tasks are named, and every task"),
    ],
)
def test_predict_refuses_what_it_cannot_answer(
    arguments: list[str],
    sentence: str,
    cli: Any,
    files: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.save(files / "flat.npy", np.zeros((2, 3), np.float32))
    np.save(files / "small.npy", np.zeros((1, 3, 16, 16), np.float32))
    monkeypatch.chdir(files)
    said = cli("predict", bundle, *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: {sentence}")


# inspect, triton, bench, doctor


def test_inspect_says_what_a_delta_and_a_bundle_hold(cli: Any, files: Path, bundle: Path) -> None:
    said = cli("inspect", files / "lora.safetensors")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("delta: lora\n")
    assert "  3 x bottleneck activation identity, bias False\n" in said.out
    assert "preprocessing: size [32, 32], interpolation bicubic" in said.out
    held = cli("inspect", files / "lora.safetensors", "--json").json
    assert held["kinds"] == {"bottleneck": 3, "head": 1}
    assert held["labels"] == [f"lora{number}" for number in range(5)]
    assert held["branches"][0] == {
        "name": "blocks.0.attn.qkv/lora",
        "kind": "bottleneck",
        "tap": "blocks.0.attn.qkv:input",
        "add": "blocks.0.attn.qkv:output",
        "settings": {"activation": "identity", "bias": False},
    }
    said = cli("inspect", bundle)
    assert (said.code, said.err) == (0, "")
    assert "mode: multi, bank constants" in said.out
    held = cli("inspect", bundle, "--json").json
    assert held["check"] == "passed"
    assert held["identity"] == open_bundle(bundle).identity
    assert [task["labels"] for task in held["tasks"]] == [
        list(task.labels) for task in open_bundle(bundle).tasks
    ]
    assert [tensor["name"] for tensor in held["engine"]["inputs"]] == ["images", "task"]
    assert (held["fan_out"], held["shared"], held["macs"]) == (None, [], None)


@pytest.mark.parametrize("name", ["nothing", "batch.npy", "pictures"])
def test_inspect_refuses_what_is_neither(name: str, cli: Any, files: Path) -> None:
    said = cli("inspect", files / name)
    assert said.out == ""
    assert said.code == (4 if name == "batch.npy" else 2)


def test_triton_writes_a_repository(cli: Any, bundle: Path, tmp_path: Path) -> None:
    said = cli("triton", bundle, "-o", tmp_path / "models")
    assert said.code == 0
    assert said.out.startswith("wrote ")
    assert f"--model-repository={tmp_path / 'models'}" in said.err
    assert list((tmp_path / "models").rglob("config.pbtxt"))
    again = cli("triton", bundle, "-o", tmp_path / "models")
    assert (again.code, again.out) == (2, "")
    assert cli("-q", "triton", bundle, "-o", tmp_path / "models", "--force").err == ""


def test_bench_times_a_bundle_and_writes_a_report(cli: Any, bundle: Path, tmp_path: Path) -> None:
    said = cli(
        "bench", bundle, "-b", 1, "-b", 2, "-m", "one", "--rounds", 2, "--warmup", 1, "--seconds", 0,
        "--threads", 1, "-o", tmp_path / "report", "--json",
    )  # fmt: skip
    assert said.code == 0
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert said.json == written
    assert "<html" in (tmp_path / "report" / "report.html").read_text()
    assert "wrote " in said.err
    again = cli("bench", bundle, "-o", tmp_path / "report")
    assert (again.code, again.out) == (2, "")


def test_bench_runs_a_recipe_and_goes_on(
    cli: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utune_deploy.deploy.bench.ceilings.SIDES", (64,))
    monkeypatch.setattr("utune_deploy.deploy.bench.ceilings.LEAST_S", 0.0)
    recipe = tmp_path / "nightly.yaml"
    recipe.write_text(
        f"format: utune-bench-recipe\nversion: 1\nbundles: {{pets: '{bundle}'}}\nbatches: [1, 2]\nmixes: [hot]\n"
        "settings: {rounds: 2, warmup: 1, seconds: 0}\ndevice: {threads: 1}\n"
    )
    said = cli("bench", "--recipe", recipe, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert "2 cases to run, 0 there already" in said.err
    assert "pets, 2 of 2, batch 2, hot: warming up, 0 %, about " in said.err
    assert said.out.startswith("pets\n")
    again = cli("bench", "--recipe", recipe, "-o", tmp_path / "out", "--json")
    assert "0 cases to run, 2 there already" in again.err
    report = again.json["pets"]
    assert [subject["name"] for subject in report["subjects"]] == ["backbone only", "pets"]
    assert [subject["task_count"] for subject in report["subjects"]] == [0, 2]
    assert report["cases"][1]["task_rows"] == [0, 1]
    for arguments in (
        ["--recipe", recipe], ["--recipe", recipe, "-o", tmp_path / "x", "-b", 1], [bundle, "--fresh"], [],
        [bundle, "--recipe", recipe, "-o", tmp_path / "x"],
    ):  # fmt: skip
        assert (cli("bench", *arguments).code, (tmp_path / "x").exists()) == (2, False)


def test_bench_refuses_batches_and_mixes_that_are_not_there(cli: Any, bundle: Path) -> None:
    for arguments in (["-b", 999], ["-m", "salad"]):
        said = cli("bench", bundle, *arguments, "--rounds", 2, "--seconds", 0, "--warmup", 1)
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith("error: ")


def test_doctor_tries_everything_and_never_fails(cli: Any, tmp_path: Path) -> None:
    said = cli("doctor", "--json", "--triton-env", tmp_path / "none")
    assert said.code == 0
    rows = {row["what"]: row for row in said.json}
    assert rows["onnxruntime cpu"]["state"].startswith("runs on CPUExecutionProvider")
    assert {
        "platform",
        "python",
        "onnxruntime cuda",
        "torch cuda",
        "tensorrt",
        "tritonserver",
    } <= set(rows)
    assert all(row["do"] for row in said.json if row["state"] == "absent")
    spoken = cli("doctor", "--triton-env", tmp_path / "none")
    assert spoken.out.splitlines()[0].split() == ["what", "state", "to", "do"]


# errors


def test_a_backbone_that_is_not_the_deltas_is_code_4(
    cli: Any, files: Path, tmp_path: Path, vit: Backbone
) -> None:
    import copy

    from utune_deploy.merge.backbone import save, wrap

    other = copy.deepcopy(vit.model)
    other.blocks[0].norm1.weight.data += 0.1
    save(tmp_path / "other", wrap(other, vit.identity.architecture, vit.identity.arguments))
    said = cli(
        "export", files / "lora.safetensors", "--weights", tmp_path / "other", "-o", tmp_path / "b"
    )
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("error: the delta belongs to another backbone")
    for label in ("where:", "wanted:", "found:", "do:"):
        assert label in said.err
    assert not (tmp_path / "b").exists()


def test_a_truncated_delta_is_code_4(cli: Any, files: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes((files / "lora.safetensors").read_bytes()[:-9])
    said = cli("inspect", tmp_path / "cut.safetensors")
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("error: the file is truncated or not safetensors")


@pytest.mark.parametrize("verb", ["predict", "check", "bench"])
def test_a_provider_that_does_not_load_is_code_5(
    verb: str, cli: Any, files: Path, bundle: Path
) -> None:
    rows = {row["what"]: row["state"] for row in cli("doctor", "--json").json}
    if rows["onnxruntime cuda"].startswith("runs"):
        pytest.skip("CUDA loads on this machine")
    rest = {
        "predict": ["--tensor", files / "batch.npy", "--task", "lora"],
        "check": [
            files / "lora.safetensors",
            files / "dual.safetensors",
            "--weights",
            files / "backbone",
        ],
        "bench": ["--rounds", 2, "--seconds", 0],
    }[verb]
    said = cli(verb, bundle, *rest, "--provider", "cuda")
    assert (said.code, said.out) == (5, "")
    assert said.err.startswith("error: ONNX Runtime")
    assert "doctor" in said.err


def test_a_failed_build_is_code_6(
    cli: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    said = cli(
        "export", files / "lora.safetensors", "--weights", files / "backbone", "-o", tmp_path / "b"
    )
    assert (said.code, said.out) == (6, "")
    assert said.err.startswith("error: torch cannot export the model to ONNX")
    assert "no such operator" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["--fly"], ["inspect"], ["inspect", "a", "b"], ["export", "d", "--weights", "w"],
     ["bench", "b", "--rounds", "1"], ["bench", "b", "--warmup", "0"], ["predict", "b", "--provider", "tpu"]],
)  # fmt: skip
def test_what_the_command_line_does_not_know_is_code_2(arguments: list[str], cli: Any) -> None:
    said = cli(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "error: " in said.err.lower()
    assert "Traceback" not in said.err


def test_mistakes_of_the_programmer_keep_their_traceback(
    cli: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utune_deploy.merge import delta

    def broken(_: Path) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(delta, "load_delta", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["inspect", str(files / "lora.safetensors")])


def test_two_v_show_where_an_error_came_from(files: Path) -> None:
    from utune_deploy.merge.errors import UsageError

    with pytest.raises(UsageError, match="no such file"):
        main(["-vv", "inspect", str(files / "nothing")])


def test_the_exit_codes_reach_the_shell(
    shell: Any, files: Path, bundle: Path, tmp_path: Path
) -> None:
    helped = shell("--help")
    assert (helped.code, helped.err) == (0, "")
    shown = shell("inspect", bundle, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert shown.json["bundle"] == "bundle"
    missing = shell("inspect", tmp_path / "nothing")
    assert (missing.code, missing.out) == (2, "")
    assert missing.err.startswith("error: there is no such file\n  where:  ")
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    (damaged / "model.onnx").write_bytes(b"")
    refused = shell("predict", damaged, "--tensor", files / "batch.npy", "--task", "lora")
    assert (refused.code, refused.out) == (4, "")
    assert "not the one that was shipped" in refused.err


def test_predict_in_a_shell_keeps_stdout_for_the_answer(
    shell: Any, files: Path, bundle: Path
) -> None:
    said = shell("predict", bundle, "--tensor", files / "batch.npy", "--task", "lora", "--json")
    assert (said.code, said.err) == (0, "")
    assert len(said.json) == 5


def test_serve_writes_requests_for_perf_analyzer(
    cli: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utune_deploy.serving.servers import embedded
    from utune_deploy.serving.servers.ports import Addresses

    def at_once(bundle: Any, **settings: Any) -> None:
        settings["on_ready"](Addresses(http="127.0.0.1:1", grpc="127.0.0.1:2"))

    monkeypatch.setattr(embedded, "serve_embedded", at_once)
    file = tmp_path / "requests.json"
    said = cli("serve", bundle, "--perf-input", file)
    assert (said.code, said.err) == (0, "")
    assert f"--input-data {file}" in said.out
    assert {entry["task"]["content"][0] for entry in json.loads(file.read_text())["data"]} == set(
        TASKS
    )
    again = cli("serve", bundle, "--perf-input", file)
    assert again.code == 2
    assert "already exists" in again.err
    assert "FILE" in cli("serve", bundle).out
