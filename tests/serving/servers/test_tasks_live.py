"""Tasks that change while a server answers: the commands, the repository, the tasks as models, and all at once."""

from __future__ import annotations

import base64
import gc
import itertools
import json
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.export.engine import Device
from utune_deploy.serving.service import Service
from utune_deploy.serving.tasks.life import KEPT_VERSIONS

IMAGES = np.random.default_rng(3).standard_normal((3, 3, 8, 8)).astype(np.float32)
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}
FRONTS = ["http", "json", "grpc"]
Refused = tritonclient.http.InferenceServerException


class Client:
    """tritonclient over one of its fronts."""

    def __init__(self, front: str, addresses) -> None:
        self.front = front
        self.module = tritonclient.grpc if front == "grpc" else tritonclient.http
        url = addresses.grpc if front == "grpc" else addresses.http
        self.client = self.module.InferenceServerClient(url)
        self.binary = {} if front == "grpc" else {"binary_data": front == "http"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def _input(self, name, array, kind, *, binary=True):
        tensor = self.module.InferInput(name, list(array.shape), kind)
        return tensor.set_data_from_numpy(array, **(self.binary if binary else {}))

    def _answer(self, model, inputs, names, **options):
        outputs = [self.module.InferRequestedOutput(name, **self.binary) for name in names]
        return self.client.infer(model, inputs, outputs=outputs, **options)

    def ask(self, images, tasks=None, *, model="tiny", version=""):
        """Logits and labels."""
        inputs = [self._input("images", images, "FP32")]
        if tasks is not None:
            inputs.append(
                self._input("task", np.array([[t] for t in tasks], dtype=object), "BYTES")
            )
        answer = self._answer(model, inputs, ["logits", "label"], model_version=version)
        labels = [x.decode() if isinstance(x, bytes) else x for x in answer.as_numpy("label")[:, 0]]
        return answer.as_numpy("logits"), labels, answer.get_response()

    def command(self, action, file=None, **fields):
        text = np.array([json.dumps({"action": action, **fields})], dtype=object)
        inputs = [self._input("command", text, "BYTES")]
        if file is not None:  # as bytes on every front: JSON holds no file
            tensor = self.module.InferInput("file", [1], "BYTES")
            inputs.append(tensor.set_data_from_numpy(np.array([file], dtype=object)))
        (reply,) = self._answer("tiny.tasks", inputs, ["reply"]).as_numpy("reply")
        return json.loads(reply)

    def refused(self, *command, **fields) -> str:
        with pytest.raises(Refused) as caught:
            self.command(*command, **fields)
        return f"{caught.value.status()} {caught.value.message()}"

    def index(self) -> dict[str, list[str]]:
        entries = self.client.get_model_repository_index()
        if self.front == "grpc":
            entries = [
                {"name": e.name, "version": e.version, "state": e.state} for e in entries.models
            ]
        assert all(entry["state"] == "READY" for entry in entries)
        return {
            name: [entry["version"] for entry in group]
            for name, group in itertools.groupby(entries, key=lambda entry: entry["name"])
        }

    def facts(self, what: str, *arguments) -> dict:
        settings = {"as_json": True} if self.front == "grpc" else {}
        return getattr(self.client, what)(*arguments, **settings)


@pytest.fixture
def live(open_live):
    """A service whose tasks change."""
    return open_live(rows=12)


@pytest.fixture
def addresses(live, embed):
    with embed(live) as running:
        yield running


@pytest.fixture(params=FRONTS)
def client(request, addresses):
    with Client(request.param, addresses) as made:
        yield made


def right(made, answered) -> bool:
    logits, labels, _ = answered
    best = made.logits(IMAGES).argmax(axis=1)
    return made.answers(IMAGES, logits) and labels == [made.labels[k] for k in best]


def test_every_command_does_what_it_says(client, make_task):
    first, second = make_task("birds", seed=1, probe=True), make_task("birds", 2, seed=2)
    listed = client.command("list")
    assert listed["model"] == "tiny"
    assert [entry["name"] for entry in listed["tasks"]] == list(CLASSES)
    added = client.command("add", first.data)["task"]
    assert (added["name"], added["version"], added["labels"]) == ("birds", 1, list(first.labels))
    assert right(first, client.ask(IMAGES, ["birds"] * 3))
    assert client.command("update", second.data)["task"]["versions"] == [1, 2]
    assert right(second, client.ask(IMAGES, ["birds"] * 3))
    assert client.command("use", task="birds", version=1)["task"]["version"] == 1
    assert right(first, client.ask(IMAGES, ["birds"] * 3))
    assert client.command("pin", task="birds")["task"]["pinned"]
    (entry,) = client.command("list", task="birds")["tasks"]
    assert (entry["pinned"], entry["resident"], entry["version"]) == (True, True, 1)
    assert not client.command("unpin", task="birds")["task"]["pinned"]
    assert client.command("remove", task="birds") == {"model": "tiny", "removed": "birds"}
    with pytest.raises(Refused, match="unknown task"):
        client.ask(IMAGES, ["birds"] * 3)
    assert len(client.command("list")["tasks"]) == 3


def test_a_sender_learns_what_to_lay_a_task_out_for(client, inputs_bundle):
    said = client.command("describe")
    assert said == {
        "model": "tiny", "identity": inputs_bundle.identity, "fingerprint": "f" * 64,
        "precision": "fp32", "slots": [], "fixed": None, "control": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ({"action": "dance"}, "unknown action"),
        ({"action": None}, "unknown action"),
        ({"action": ["list"]}, "unknown action"),
        ({"action": {}}, "unknown action"),
        ({"action": "list", "task": "birds"}, "unknown task"),
        ({"action": "list", "task": 1}, "names no task"),
        ({"action": "add"}, "without its packed task"),
        ({"action": "update"}, "without its packed task"),
        ({"action": "remove"}, "names no task"),
        ({"action": "remove", "task": ""}, "names no task"),
        ({"action": "remove", "task": ["pets"]}, "names no task"),
        ({"action": "remove", "task": "birds"}, "unknown task"),
        ({"action": "use", "task": "pets"}, "names no version"),
        ({"action": "use", "task": "pets", "version": True}, "names no version"),
        ({"action": "use", "task": "pets", "version": "1"}, "names no version"),
        ({"action": "use", "task": "pets", "version": 2}, "no such version"),
        ({"action": "use", "task": "pets", "version": -1}, "no such version"),
        ({"action": "pin", "task": "birds"}, "unknown task"),
    ],
    ids=str,
)
def test_commands_that_cannot_be_carried_out_are_the_clients_mistake(addresses, command, sentence):
    for front in FRONTS:
        with Client(front, addresses) as client:
            said = client.refused(
                command["action"], **{k: v for k, v in command.items() if k != "action"}
            )
            assert sentence in said
            assert ("INVALID_ARGUMENT" if front == "grpc" else "400") in said


WRONG = ("400", "INVALID_ARGUMENT")
UNFIT = ("422", "FAILED_PRECONDITION")


def test_a_packed_task_that_does_not_fit_is_the_clients_mistake(client, live, make_task):
    before = client.command("list")
    elsewhere = make_task("birds").changed(identity="0" * 64).data
    for bad, sentence, status in (
        (b"hello", "no safetensors file", UNFIT),
        (elsewhere, "laid out for another bundle", UNFIT),
        (make_task("pets", seed=1).data, "is there already", WRONG),
    ):
        assert sentence in (said := client.refused("add", bad))
        assert status[client.front == "grpc"] in said
    wrong = make_task("birds", probe=True)
    wrong = wrong.changed(tensors={k: 1.1 * v for k, v in wrong.packed.tensors.items()})
    said = client.refused("add", wrong.data)
    assert "does not answer as the task does in torch" in said
    assert ("ABORTED" if client.front == "grpc" else "409") in said
    assert "there is no task of that name to update" in client.refused(
        "update", make_task("birds").data
    )
    assert client.command("list") == before
    assert live.counters.read().rows_by_task.keys() == CLASSES.keys()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "not those of a command"),
        ([("file", "BYTES", [1], ["a"])], "not those of a command"),
        (
            [("command", "BYTES", [1], ["{}"]), ("more", "BYTES", [1], ["a"])],
            "not those of a command",
        ),
        ([("command", "FP32", [1], [1.0])], "wrong datatype"),
        ([("command", "BYTES", [2], ["{}", "{}"])], "wrong shape"),
        ([("command", "BYTES", [0], [])], "wrong shape"),
        ([("command", "BYTES", [1], ["{"])], "not JSON"),
        ([("command", "BYTES", [1], ["[" * 100_000])], "not JSON"),
        ([("command", "BYTES", [1], ["[]"])], "not a JSON object"),
        ([("command", "BYTES", [1], ["\ud800"])], "not text in UTF-8"),
        ([("command", "BYTES", [1], ['{"action": "list", "task": "\\ud800"}'])], "unknown task"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_inputs_that_are_no_command_are_a_400(addresses, inputs, sentence):
    import http.client
    from contextlib import closing

    keys = ("name", "datatype", "shape", "data")
    body = json.dumps({"inputs": [dict(zip(keys, values, strict=True)) for values in inputs]})
    with closing(http.client.HTTPConnection(addresses.http)) as connection:
        connection.request("POST", "/v2/models/tiny.tasks/infer", body)
        response = connection.getresponse()
        said = json.loads(response.read())["error"]
    assert (response.status, sentence in said) == (400, True), said


def test_tasks_are_loaded_and_unloaded_as_models_are(client, make_task):
    birds, newer = make_task("birds", 4, seed=1, probe=True), make_task("birds", 2, seed=2)
    # tritonclient asks for a configuration beside the files; a task brings its own.
    load = {"config": "{}", "files": {"file:1/birds.task": birds.data}}
    client.client.load_model("birds", **load)
    assert client.client.is_model_ready("birds")
    assert right(birds, client.ask(IMAGES, ["birds"] * 3))
    client.client.load_model("birds", config="{}", files={"file:1/x.task": newer.data})
    assert right(newer, client.ask(IMAGES, model="birds"))
    client.client.load_model("birds")  # without a file it stays as it is
    assert client.index()["birds"] == ["1", "2"]
    client.client.unload_model("birds")
    assert not client.client.is_model_ready("birds")
    assert "birds" not in client.index()


def test_loads_and_unloads_that_cannot_be_are_refused(client, make_task):
    birds = make_task("birds").data
    unknown = "NOT_FOUND" if client.front == "grpc" else "404"
    wrong = "INVALID_ARGUMENT" if client.front == "grpc" else "400"

    def refused(act, *arguments, **settings) -> str:
        with pytest.raises(Refused) as caught:
            act(*arguments, **settings)
        return f"{caught.value.status()} {caught.value.message()}"

    load, unload = client.client.load_model, client.client.unload_model
    said = refused(load, "birds")
    assert unknown in said
    assert "no such model to load" in said
    said = refused(load, "fish", config="{}", files={"file:1/x": birds})
    assert wrong in said
    assert "another name than the model" in said
    two = {"file:1/x": birds, "file:1/y": birds}
    assert wrong in refused(load, "birds", config="{}", files=two)
    unfit = UNFIT[client.front == "grpc"]
    assert unfit in refused(load, "birds", config="{}", files={"file:1/x": b"hello"})
    for own in ("tiny", "tiny.tasks"):
        assert wrong in refused(load, own, config="{}", files={"file:1/x": birds})
        assert wrong in refused(unload, own)
        load(own)
    said = refused(unload, "birds")
    assert unknown in said
    unload("pets")
    unload("cars")
    assert "the last task cannot be removed" in refused(unload, "flowers")
    assert list(client.index()) == ["tiny", "tiny.tasks", "tiny.pictures", "flowers"]


@pytest.mark.parametrize("content", ["%%%", "aGVsbG8", 7, None, ["aGVsbG8="], {}, "Fl\u00fcgel"])
def test_a_file_that_is_no_base64_is_a_400(addresses, content):
    import http.client
    from contextlib import closing

    with closing(http.client.HTTPConnection(addresses.http)) as connection:
        body = json.dumps({"parameters": {"file:1/x.task": content}})
        connection.request("POST", "/v2/repository/models/birds/load", body)
        response = connection.getresponse()
        said = json.loads(response.read())["error"]
    assert (response.status, "not base64" in said) == (400, True), said


def test_a_load_by_hand_is_base64_in_json(live, addresses, make_task):
    import http.client
    from contextlib import closing

    birds = make_task("birds")
    with closing(http.client.HTTPConnection(addresses.http)) as connection:
        body = json.dumps({"parameters": {"file:1/x": base64.b64encode(birds.data).decode()}})
        connection.request("POST", "/v2/repository/models/birds/load", body)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
    assert "birds" in live.registry.versions


def test_every_task_is_a_model_in_its_versions(client, live, make_task):
    made = {1: make_task("cars"), 2: make_task("cars", 5, seed=1), 3: make_task("cars", 2, seed=2)}
    for number in (2, 3):
        live.add(made[number].data, update=True)
    live.tasks.use("cars", 2)
    assert client.index() == {
        "tiny": ["1"], "tiny.tasks": ["1"], "tiny.pictures": ["1"], "pets": ["1"], "cars": ["1", "3", "2"], "flowers": ["1"],
    }  # fmt: skip
    for asked, number in (("", 2), ("1", 1), ("2", 2), ("3", 3)):
        answered = client.ask(IMAGES, model="cars", version=asked)
        assert answered[0].shape == (3, len(made[number].labels))
        assert right(made[number], answered)
        metadata = client.facts("get_model_metadata", "cars", asked)
        assert metadata["name"] == "cars"
        assert metadata["versions"] == ["1", "3", "2"]
        assert [entry["name"] for entry in metadata["inputs"]] == ["images"]
        logits = metadata["outputs"][0]
        assert list(map(int, logits["shape"])) == [-1, len(made[number].labels)]
        config = client.facts("get_model_config", "cars", asked)
        config = config.get("config", config)
        assert (config["name"], config["max_batch_size"]) == ("cars", 8)
        assert [entry["name"] for entry in config["input"]] == ["images"]
        assert list(map(int, config["output"][0]["dims"])) == [len(made[number].labels)]
    for number in ("4", "0", "01", "x", "-1"):
        with pytest.raises(Refused, match="unknown model"):
            client.ask(IMAGES, model="cars", version=number)
        assert not client.client.is_model_ready("cars", number)


def test_a_task_as_a_model_answers_as_the_bundle_does_to_the_bit(client):
    for name, count in CLASSES.items():
        own, labels, _ = client.ask(IMAGES, model=name)
        whole, same, _ = client.ask(IMAGES, [name] * 3)
        assert own.tobytes() == np.ascontiguousarray(whole[:, :count]).tobytes()
        assert labels == same


def test_the_answer_names_the_version_that_was_asked_for(client, live, make_task):
    live.add(make_task("cars", seed=1).data, update=True)
    for version in ("", "1", "2"):
        response = client.ask(IMAGES, model="cars", version=version)[2]
        of = response.get if client.front != "grpc" else lambda key, r=response: getattr(r, key)
        assert (of("model_name"), of("model_version")) == ("cars", version or "2")


def test_a_task_as_a_model_takes_no_task_and_no_unknown_output(client):
    with pytest.raises(Refused, match="unexpected inference input"):
        client.ask(IMAGES, ["cars"] * 3, model="cars")
    with pytest.raises(Refused, match="batch-size must be <= 8"):
        client.ask(np.repeat(IMAGES, 3, axis=0), model="cars")
    with pytest.raises(Refused, match="unexpected inference output"):
        client._answer("cars", [client._input("images", IMAGES, "FP32")], ["task"])


def test_best_classes_of_a_task_are_its_own(client, live, make_task):
    made = make_task("cars", 2, seed=4)
    live.add(made.data, update=True)
    outputs = [client.module.InferRequestedOutput("logits", class_count=4, **client.binary)]
    inputs = [client._input("images", IMAGES, "FP32")]
    cells = client.client.infer("cars", inputs, outputs=outputs).as_numpy("logits")
    cells = [[c.decode() if isinstance(c, bytes) else c for c in row] for row in cells]
    order = (-made.logits(IMAGES)).argsort(axis=1)
    assert [[c.split(":")[2] for c in row if c] for row in cells] == [
        [made.labels[k] for k in best] for best in order
    ]


def test_statistics_count_each_task_in_its_version(client, live, make_task):
    live.add(make_task("cars", seed=1).data, update=True)
    client.ask(IMAGES, ["cars", "pets", "cars"])
    client.ask(IMAGES, model="cars")
    stats = client.facts("get_inference_statistics")["model_stats"]
    counts = {(s["name"], s["version"]): int(s.get("inference_count", 0)) for s in stats}
    assert counts["cars", "2"] - 1 in (4, 5)  # the row that the update was held to counts too
    assert counts["pets", "1"] == 1
    assert ("tiny.tasks", "1") not in counts


def test_a_server_that_gives_no_control_shows_and_does_not_change(embed, open_live, make_task):
    with embed(open_live(), task_control=False) as addresses:
        for front in FRONTS:
            with Client(front, addresses) as client:
                assert not client.command("describe")["control"]
                assert len(client.command("list")["tasks"]) == 3
                birds = make_task("birds").data
                for said in (
                    client.refused("add", birds),
                    client.refused("update", birds),
                    client.refused("remove", task="pets"),
                    client.refused("use", task="pets", version=1),
                    client.refused("pin", task="pets"),
                ):
                    assert "does not let clients change its tasks" in said
                load, unload = client.client.load_model, client.client.unload_model
                with pytest.raises(Refused, match="does not let clients change"):
                    load("birds", config="{}", files={"file:1/x": birds})
                with pytest.raises(Refused, match="does not let clients change"):
                    unload("pets")
                assert client.ask(IMAGES, model="pets")[0].shape == (3, 5)


def test_a_bundle_of_constants_has_its_tasks_as_models_and_no_changes(embed, bundle, make_task):
    service = Service.open(bundle, Device(threads=1))
    with embed(service) as addresses:
        for front in FRONTS:
            with Client(front, addresses) as client:
                assert (
                    client.command("describe")["fixed"] == "its tasks are constants of the engine"
                )
                assert "cannot change while it is served" in client.refused("remove", task="pets")
                wanted = service.answer(IMAGES, ["cars"] * 3).logits[:, :3]
                assert (
                    client.ask(IMAGES, model="cars")[0].tobytes()
                    == np.ascontiguousarray(wanted).tobytes()
                )
                assert client.index()["cars"] == ["1"]


def test_a_packed_task_may_be_larger_than_any_request(embed, open_live, make_task, monkeypatch):
    monkeypatch.setattr("utune_deploy.serving.servers.fronts.MIN_BODY", 8 << 10)
    monkeypatch.setattr("utune_deploy.serving.servers.fronts.JSON_GROWTH", 1)
    service = open_live()
    # as if the bank were that large
    monkeypatch.setattr("utune_deploy.serving.servers.fronts.row_bytes", lambda bundle: 1 << 20)
    birds = make_task("birds")
    padded = make_task("birds").changed(
        labels=("a", "b", "c"), tensors={**birds.packed.tensors, "other": np.zeros(1 << 17)}
    )
    with embed(service) as addresses:
        for front in FRONTS:
            with Client(front, addresses) as client:
                client.command("add", padded.data)
                client.client.unload_model("birds")
                client.client.load_model("birds", config="{}", files={"file:1/x": padded.data})
                client.command("remove", task="birds")


class Clock:
    """When which version of a task may have answered: from before its change began to after it was replaced."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lives: dict[str, list[list]] = {}  # [made or None, from, to]

    def begin(self, name, made, when=None) -> list:
        entry = [made, time.monotonic() if when is None else when, float("inf")]
        with self.lock:
            self.lives.setdefault(name, []).append(entry)
        return entry

    def between(self, name, start, end) -> list:
        with self.lock:
            return [
                made for made, since, until in self.lives[name] if since <= end and until >= start
            ]


def test_changes_under_load_bring_no_wrong_and_no_lost_answer(embed, open_live, make_task):
    """16 threads ask mixed tasks over both transports while tasks come, change and go, with few rows."""
    service = open_live(rows=10)
    clock, done, asked = Clock(), threading.Event(), []
    wrong: list[object] = []
    fixed = [f"fixed{n}" for n in range(8)]  # more tasks than rows
    for number, name in enumerate(fixed):
        made = make_task(name, 2 + number % 4, seed=number)
        service.add(made.data)
        clock.begin(name, made, 0)
    for name in CLASSES:
        clock.begin(name, make_task(name), 0)
    clock.begin("guest", None, 0)
    names = [*fixed, *CLASSES, "guest", "guest"]

    def ask(front: str, seed: int) -> None:
        try:
            keep_asking(front, seed)
        except BaseException as error:
            wrong.append(error)

    def keep_asking(front: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        count = 0
        with Client(front, addresses) as client:
            while not done.is_set() or count < 5:
                images = random.standard_normal((random.integers(1, 4), 3, 8, 8)).astype(np.float32)
                as_model = random.random() < 0.3
                tasks = [names[n] for n in random.integers(0, len(names), len(images))]
                if as_model:
                    tasks = tasks[:1] * len(images)
                start = time.monotonic()
                try:
                    if as_model:
                        logits, labels, _ = client.ask(images, model=tasks[0])
                    else:
                        logits, labels, _ = client.ask(images, tasks)
                except Refused as error:
                    end = time.monotonic()
                    unknown = "unknown task" in str(error) or "unknown model" in str(error)
                    if (
                        not unknown
                        or None not in clock.between("guest", start, end)
                        or "guest" not in tasks
                    ):
                        wrong.append(error)
                except Exception as error:
                    wrong.append(error)
                else:
                    end = time.monotonic()
                    for row, name in enumerate(tasks):
                        image = images[row : row + 1]
                        if not any(
                            made.answers(image, logits[row : row + 1])
                            and labels[row] in made.labels
                            for made in clock.between(name, start, end)
                            if made is not None
                        ):
                            wrong.append((name, labels[row]))
                count += 1
        asked.append(count)

    current = {name: clock.lives[name][-1] for name in (*CLASSES, "guest")}

    def change(name: str, made, act, *arguments, **settings) -> None:
        entry = clock.begin(name, made)
        act(*arguments, **settings)
        current[name][2] = time.monotonic()
        current[name] = entry

    with embed(service) as addresses:
        threads = [
            threading.Thread(target=ask, args=(("http", "grpc")[n % 2], n)) for n in range(16)
        ]
        for thread in threads:
            thread.start()
        try:
            with Client("http", addresses) as web, Client("grpc", addresses) as rpc:
                before: dict = {}
                for step in range(1, 26):
                    client = (web, rpc)[step % 2]
                    name = list(CLASSES)[step % 3]
                    made = make_task(name, 2 + step % 4, seed=step, probe=True)
                    change(name, made, client.command, "update", made.data)
                    if name in before and step % 2:
                        (entry,) = client.command("list", task=name)["tasks"]
                        *_, older, newest = entry["versions"]
                        for version, answers in ((older, before[name]), (newest, made)):
                            change(name, answers, client.command, "use", task=name, version=version)
                    before[name] = made
                    guest = make_task("guest", 3, seed=step)
                    file = {"config": "{}", "files": {"file:1/guest.task": guest.data}}
                    change("guest", guest, client.client.load_model, "guest", **file)
                    client.command("pin" if step % 2 else "unpin", task="guest")
                    change("guest", None, client.client.unload_model, "guest")
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:5]
    assert len(asked) == 16
    assert service.resident.evictions > 0
    gc.collect()
    service.tasks.remove("fixed0")  # what nobody asks for any more goes with the next change
    service.tasks.remove("fixed1")
    assert len(list(service.tasks.store.folder.glob("*.task"))) <= 7 + 3 * KEPT_VERSIONS
