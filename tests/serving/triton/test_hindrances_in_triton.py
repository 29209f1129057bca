"""What hinders an alias in a real tritonserver, and hinders nothing else."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from utune_deploy.serving.client import Client
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions

from .running import IMAGES, ONE, answers_as, pixels, started, until

if TYPE_CHECKING:
    from pathlib import Path

OTHER = """
import numpy as np, triton_python_backend_utils as triton

class TritonPythonModel:
    def execute(self, requests):
        said = triton.Tensor("said", np.array([42], np.int32))
        return [triton.InferenceResponse([said]) for _ in requests]
"""

pytestmark = pytest.mark.parametrize("mode", ["poll", "explicit"])


@pytest.fixture
def models(inputs_bundle, tmp_path):
    options = ModelOptions(task_control=True, rows=8)
    return write_repository(
        inputs_bundle, tmp_path / "models", device=ONE, options=options, aliases=True
    ).parent


@pytest.fixture
def unwritable(models):
    """`unwritable()` -> words before a command for which the repository is read-only from then on."""

    def close() -> list[str]:
        for folder in (models, *(path for path in models.rglob("*") if path.is_dir())):
            folder.chmod(0o555)
        if os.geteuid() != 0:
            return []
        if shutil.which("setpriv") is None:
            pytest.skip("modes of files do not hinder root, and there is no setpriv to change that")
        return ["setpriv", "--bounding-set=-dac_override"]

    yield close
    for folder in (path for path in models.parent.rglob("*") if path.is_dir()):
        folder.chmod(0o755)  # the end of a tritonserver has moved some


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Each path in it, its inode and when it was last changed."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_ino, status.st_mtime_ns) for path, status in found.items()}


def test_a_repository_that_cannot_be_written_to_hinders_no_task(
    models, unwritable, triton_environment, make_task, tmp_path, monkeypatch, mode
):
    birds, cars = make_task("birds", seed=1), make_task("cars", seed=2)
    prefix, why = unwritable(), "its folder cannot be written: Permission denied"
    before = contents(models)
    with (
        started(triton_environment, tmp_path, mode, monkeypatch, prefix=prefix) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(addresses.http) as web,
    ):
        added = client.add(birds.data)
        assert (added.alias, added.no_alias) == (None, why)
        answer = client.ask(IMAGES[0], task="birds")
        assert answer.label == birds.labels[int(birds.logits(IMAGES[:1]).argmax())]
        assert client.update(cars.data).no_alias == why
        logits = web.infer("tiny.cars", pixels()).as_numpy("logits")
        assert cars.answers(IMAGES[:3], logits)
        client.remove("flowers")
        with pytest.raises(InferenceServerException, match=r"unknown task|unknown model"):
            web.infer("tiny.flowers", pixels())
        listed = {task.name: (task.alias, task.no_alias) for task in client.tasks()}
        assert listed == {"pets": ("tiny.pets", None), "cars": (None, why), "birds": (None, why)}
        client.remove("birds")
        assert answers_as(web, "tiny.pets", make_task("pets"))
        assert contents(models) == before


def test_another_model_of_an_aliass_name_is_left_alone(
    models, triton_environment, make_task, tmp_path, monkeypatch, mode
):
    other = models / "tiny.birds"
    (other / "1").mkdir(parents=True)
    (other / "1" / "model.py").write_text(OTHER)
    (other / "1" / "__pycache__").touch()  # no byte code, which would be a change
    tensor = "name: {} data_type: TYPE_INT32 dims: 1"
    (other / "config.pbtxt").write_text(
        f'name: "tiny.birds" backend: "python" input {{ {tensor.format(chr(34) + "given" + chr(34))} }}'
        f" output {{ {tensor.format(chr(34) + 'said' + chr(34))} }}"
    )
    before = contents(other)
    given = http.InferInput("given", [1], "INT32")
    given.set_data_from_numpy(np.zeros(1, np.int32))
    birds, second = make_task("birds", seed=1), make_task("birds", seed=2)
    why = "another model is called tiny.birds"
    with (
        started(triton_environment, tmp_path, mode, monkeypatch) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(addresses.http) as web,
    ):

        def is_untouched() -> bool:
            said = web.infer("tiny.birds", [given]).as_numpy("said").item()
            return said == 42 and contents(other) == before

        assert client.add(birds.data).no_alias == why
        assert client.update(second.data).no_alias == why
        assert client.ask(IMAGES[0], task="birds").label in second.labels
        assert {t.name: t.no_alias for t in client.tasks() if t.no_alias} == {"birds": why}
        assert is_untouched()
        client.remove("birds")
        assert client.add(birds.data).no_alias == why
        assert answers_as(web, "tiny.pets", make_task("pets"))
        assert is_untouched()
        if mode == "explicit":
            web.unload_model("tiny.birds")
        other.rename(tmp_path / "elsewhere")
        if mode == "poll":
            until(lambda: not web.is_model_ready("tiny.birds"))
        assert client.update(second.data).alias == "tiny.birds"
        until(lambda: web.is_model_ready("tiny.birds"))
        assert answers_as(web, "tiny.birds", second)
