"""Questions over the real embedded server: rows, pictures, videos, and who prepares them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.preprocessing import Clip, Preprocessing
from utune_deploy.serving.client import AsyncClient, Client
from utune_deploy.serving.client.failures import Failure
from utune_deploy.serving.rejections import InvalidRequest, UnknownModel
from utune_deploy.serving.service import Service

SIZE = 8


@pytest.fixture(scope="module")
def addresses(embed, service):
    with embed(service) as running:
        yield running


@pytest.fixture
def client(client_kind, url, addresses):
    with client_kind(url(addresses)) as made:
        yield made


@pytest.fixture
def tasks(client, bundle, tasks_of):
    """The stand-in for the tasks' model, beside the embedded server."""
    made = tasks_of(bundle)
    client.put(made.beside)
    return made


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _close(answer, service, row, task) -> bool:
    reference = service.answer(row[None], [task])
    own = len(service.registry.bundle.task(task).labels)
    return (
        answer.task == task
        and answer.label == reference.labels[0]
        and answer.score == pytest.approx(float(reference.scores[0]), rel=1e-4)
        and answer.logits.shape == (own,)
        and np.allclose(answer.logits, reference.logits[0, :own], rtol=1e-4, atol=1e-4)
    )


def test_a_row_is_answered_as_in_this_process(client, service, rows):
    images, names = rows(1)
    assert _close(client.ask(images[0], task=names[0]), service, images[0], names[0])


@pytest.mark.parametrize("count", [1, 8, 9, 21])
def test_many_rows_of_many_tasks_keep_their_order(client, service, rows, count):
    images, names = rows(count, seed=count)
    answers = client.ask_many(images, tasks=names)
    assert [answer.task for answer in answers] == names
    for answer, row, name in zip(answers, images, names, strict=True):
        assert _close(answer, service, row, name)


def test_rows_share_requests_of_the_largest_batch(client, tasks, rows):
    images, names = rows(21)
    client.ask_many(list(images), tasks=names)
    sizes = [len(call.inputs["images"]) for call in tasks.seam.calls if hasattr(call, "inputs")]
    assert sizes == [8, 8, 5]


def test_nothing_is_asked_of_nothing(client):
    assert client.ask_many([], tasks="pets") == ()


@pytest.mark.parametrize("form", ["path", "text", "bytes", "pillow"])
def test_a_picture_is_prepared_as_its_task_says(client, tasks, service, picture, tmp_path, form):
    settings = Preprocessing((SIZE, SIZE), interpolation="bilinear", crop=0.8, mean=(0.1, 0.2, 0.3))
    tasks.table["cars"]["preprocessing"] = settings.to_json()
    path = tmp_path / "cat.png"
    picture.save(path)
    sources = {"path": path, "text": str(path), "bytes": path.read_bytes(), "pillow": picture}
    answer = client.ask(sources[form], task="cars")
    assert _close(answer, service, settings.apply(picture), "cars")


def test_pictures_and_rows_of_several_tasks_share_a_request(client, tasks, service, picture, rows):
    row = rows(1)[0][0]
    prepared = Preprocessing((SIZE, SIZE)).apply(picture)
    answers = client.ask_many([picture, row, picture], tasks=["pets", "cars", "flowers"])
    expected = [(prepared, "pets"), (row, "cars"), (prepared, "flowers")]
    for answer, (pixels, name) in zip(answers, expected, strict=True):
        assert _close(answer, service, pixels, name)
    assert [command["action"] for command in tasks.commands] == ["list"]


def test_facts_are_asked_for_once(client, tasks, picture):
    for _ in range(3):
        client.ask(picture, task="pets")
    assert len(tasks.commands) == 1


def test_facts_that_are_old_are_asked_for_again(
    client_kind, url, addresses, bundle, tasks_of, picture
):
    stand_in = tasks_of(bundle)
    with client_kind(url(addresses), facts_age_s=0.0) as client:
        client.put(stand_in.beside)
        client.ask(picture, task="pets")
        client.ask(picture, task="pets")
    assert len(stand_in.commands) >= 2


def test_a_picture_that_is_refused_is_prepared_again_where_its_task_changed(
    client, tasks, service, picture
):
    tasks.table["pets"]["preprocessing"] = Preprocessing((9, 9)).to_json()
    with pytest.raises(InvalidRequest, match="unexpected shape"):
        client.ask(picture, task="pets")
    settings = Preprocessing((SIZE, SIZE), mean=(0.1, 0.1, 0.1))
    tasks.table["pets"]["preprocessing"] = settings.to_json()
    assert _close(client.ask(picture, task="pets"), service, settings.apply(picture), "pets")


def test_an_answer_that_is_none_of_the_task_has_its_facts_asked_for_again(
    client, tasks, service, picture
):
    right = tasks.table["pets"]
    tasks.table["pets"] = {**right, "labels": ["cat", "dog"]}
    client.tasks()
    tasks.table["pets"] = right
    settings = Preprocessing((SIZE, SIZE))
    assert _close(client.ask(picture, task="pets"), service, settings.apply(picture), "pets")
    assert len(tasks.commands) == 2


def test_a_task_that_came_later_is_found(client, tasks, picture):
    entry = tasks.table.pop("flowers")
    client.tasks()
    with pytest.raises(InvalidRequest, match="unknown task"):
        client.ask(picture, task="flowers")
    tasks.table["flowers"] = entry
    assert client.ask(picture, task="flowers").task == "flowers"


@pytest.mark.parametrize("views", [1, 3, 11])  # 11 views are more than a batch
def test_a_video_is_answered_by_the_mean_of_its_views(client, tasks, service, picture, views):
    """The tiny engine reads pictures, so a clip of one frame is cut to one here."""
    frames = [picture.rotate(10 * turn) for turn in range(12)]
    settings = Preprocessing((SIZE, SIZE), clip=Clip(1, 1, views))
    tasks.table["pets"]["preprocessing"] = settings.to_json()

    class Flat:  # [views, C, 1, H, W] -> [views, C, H, W]
        def __init__(self, inner) -> None:
            self.inner = inner
            self.close = inner.close

        def send(self, call, limit_s):
            images = getattr(call, "inputs", {}).get("images")
            if images is not None and images.ndim == 5:
                call = replace(call, inputs={**call.inputs, "images": images[:, :, 0]})
            return self.inner.send(call, limit_s)

    client.put(Flat)
    answer = client.ask(frames, task="pets")
    rows = settings.apply(frames)[:, :, 0]
    logits = np.concatenate([service.answer(row[None], ["pets"]).logits for row in rows])
    expected = logits.astype(np.float64).mean(axis=0)
    assert np.allclose(answer.logits, expected, rtol=1e-4, atol=1e-4)
    assert answer.label == f"pets-{expected.argmax()}"
    shares = np.exp(expected - expected.max())
    assert answer.score == pytest.approx(float(shares.max() / shares.sum()), rel=1e-4)


def test_pictures_want_a_server_that_says_how(client, tasks, picture, monkeypatch):
    def unknown(call):
        raise Failure(UnknownModel("unknown model or version", found=call.model))

    monkeypatch.setattr(tasks, "answer", unknown)
    with pytest.raises(UnknownModel, match="how its tasks want") as refused:
        client.ask(picture, task="pets")
    assert refused.value.details["wanted"] == "the model tiny.tasks"
    assert "arrays" in refused.value.details["do"]


def test_the_server_itself_says_how(client, service, picture):
    prepared = Preprocessing((SIZE, SIZE)).apply(picture)
    assert _close(client.ask(picture, task="cars"), service, prepared, "cars")


def test_rows_by_name(client_kind, url, embed, text, sentences):
    service = Service.open(text, Device(threads=1))
    batch = sentences(11)
    names = [("pets", "cars", "flowers")[row % 3] for row in range(11)]
    with embed(service) as running, client_kind(url(running)) as client:
        answers = client.ask_many(batch, tasks=names)
        one = client.ask({name: array[0] for name, array in batch.items()}, task="pets")
        narrow = client.ask(
            {
                name: array[0].astype(np.int32) if array.dtype == np.int64 else array[0]
                for name, array in batch.items()
            },
            task="pets",
        )
        with pytest.raises(InvalidRequest, match="one array is given for several inputs"):
            client.ask(batch["input_ids"][0], task="pets")
    for row, (answer, name) in enumerate(zip(answers, names, strict=True)):
        reference = service.answer({k: v[row : row + 1] for k, v in batch.items()}, [name])
        assert answer.label == reference.labels[0]
    assert np.allclose(one.logits, answers[0].logits, atol=1e-5)
    assert one.logits.tobytes() == narrow.logits.tobytes()


def test_tasks_without_labels_answer_with_arrays(client_kind, url, embed, arrays, rows):
    service = Service.open(arrays, Device(threads=1))
    images, _ = rows(1)
    with embed(service) as running, client_kind(url(running)) as client:
        answer = client.ask(images[0], task="cars")
    assert (answer.label, answer.score) == (None, None)
    np.testing.assert_allclose(answer.logits, service.answer(images, ["cars"]).logits[0], rtol=1e-5)


def test_the_only_task_needs_no_name(client_kind, url, embed, single, rows, tasks_of, picture):
    service = Service.open(single, Device(threads=1))
    with embed(service) as running, client_kind(url(running)) as client:
        client.put(tasks_of(single).beside)
        answer = client.ask(rows(1)[0][0])
        seen = client.ask(picture)
    assert answer.label.startswith("cars-")
    assert seen.label.startswith("cars-")
    assert (answer.task, seen.task) == (None, "cars")


def test_the_model_of_every_task_is_not_taken_for_a_second_one(
    client_kind, url, embed, two_engines, rows
):
    images, names = rows(1)
    with (
        embed(Service.open(two_engines, Device(threads=1))) as running,
        client_kind(url(running)) as client,
        client_kind(url(running), model="tiny") as named,
    ):
        assert (
            client.ask(images[0], task=names[0]).label == named.ask(images[0], task=names[0]).label
        )


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["tiny", "tiny.tasks", "pets", "cars"], None),
        (["tiny", "tiny.all"], None),  # a server without models of tasks
        (["a", "a.tasks", "b", "b.all", "b.tasks", "pets"], "a, b"),
        ([], "no model is ready"),
    ],
)
def test_the_bundle_is_told_from_its_tasks_models(client_kind, stage, models, said):
    stage.models = models
    row = np.zeros(2, np.float32)
    with client_kind(stage.url) as client:
        if said is None:
            assert client.ask(row, task="pets").label == "dog"
        else:
            with pytest.raises(UsageError, match=said):
                client.ask(row, task="pets")


def test_an_unknown_model_is_said(client_kind, url, addresses):
    with (
        client_kind(url(addresses), model="other") as client,
        pytest.raises(UnknownModel) as refused,
    ):
        client.ask(np.zeros((3, SIZE, SIZE), np.float32), task="pets")
    assert refused.value.what == "Request for unknown model: 'other' is not found"


@pytest.mark.parametrize(
    ("source", "task", "said"),
    [
        (np.zeros((3, SIZE, SIZE)), "pets", "wrong dtype"),
        (np.zeros((3, SIZE, SIZE), np.uint8), "pets", "wrong dtype"),
        (np.zeros((1, 3, SIZE, SIZE), np.float32), "pets", "wrong shape"),
        ({"pixels": np.zeros((3, SIZE, SIZE), np.float32)}, "pets", "other inputs"),
        (np.full((3, SIZE, SIZE), np.nan, np.float32), "pets", "not finite"),
        (np.zeros((3, SIZE, SIZE), np.float32), "birds", "unknown task"),
        (np.zeros((3, SIZE, SIZE), np.float32), None, r"missing required input\(s\) \['task'\]"),
    ],
)
def test_a_row_that_cannot_be_answered_is_refused(client, source, task, said):
    with pytest.raises(InvalidRequest, match=said):
        client.ask(source, task=task)


def test_what_a_server_refuses_keeps_its_details(client):
    with pytest.raises(InvalidRequest) as refused:
        client.ask(np.zeros((3, SIZE, SIZE), np.float32), task="birds")
    assert refused.value.what == "unknown task"
    assert refused.value.details["found"] == "birds"
    assert refused.value.details["wanted"] == "one of pets, cars, flowers"


@pytest.mark.parametrize("tasks_given", [["pets"], ["pets"] * 3])
def test_one_task_for_all_or_one_for_each(client, rows, tasks_given):
    with pytest.raises(InvalidRequest, match="one task per row"):
        client.ask_many(rows(2)[0], tasks=tasks_given)


def test_several_things_are_a_list(client):
    with pytest.raises(InvalidRequest, match="with one"):
        client.ask_many("cat.jpg", tasks="pets")


def test_a_picture_that_is_none_is_said(client, tasks, tmp_path):
    with pytest.raises(UsageError, match="no such picture"):
        client.ask(tmp_path / "cat.jpg", task="pets")
    with pytest.raises(UsageError, match="no picture that can be read"):
        client.ask(b"not a picture", task="pets")


@pytest.mark.parametrize("source", [[0.1, 0.2], [], 3, None, ["cat.jpg"]])
def test_what_is_neither_picture_nor_row_is_refused(client, tasks, source):
    with pytest.raises(InvalidRequest, match="neither a picture nor a row"):
        client.ask(source, task="pets")


def test_real_triton_answers_too(client_kind, url, triton_environment, bundle, service, rows):
    from utune_deploy.serving.servers.triton import running

    images, names = rows(9)
    with (
        running(bundle, environment=triton_environment, device=Device(threads=1)) as process,
        client_kind(url(process.addresses)) as client,
    ):
        answers = client.ask_many(images, tasks=names, deadline_s=30.0, priority=1)
        with pytest.raises(InvalidRequest, match="unknown task"):
            client.ask(images[0], task="birds")
    assert all(map(_close, answers, [service] * 9, images, names))


def test_a_closed_client_says_so(client_kind, url, addresses):
    with client_kind(url(addresses)) as client:
        client.close()
        with pytest.raises(UsageError, match="closed"):
            client.tasks()


def test_threads_share_a_client(url, addresses, service, rows):
    wrong = []
    with Client(url(addresses)) as client, ThreadPoolExecutor(8) as pool:

        def ask(seed: int) -> None:
            images, names = rows(3, seed=seed)
            answers = client.ask_many(images, tasks=names)
            wrong.extend(
                seed
                for answer, row, name in zip(answers, images, names, strict=True)
                if not _close(answer, service, row, name)
            )

        list(pool.map(ask, range(60)))
    assert not wrong


def test_coroutines_share_a_client(url, addresses, service, rows):
    async def ask(client: AsyncClient, seed: int) -> bool:
        images, names = rows(3, seed=seed)
        answers = await client.ask_many(images, tasks=names)
        return all(map(_close, answers, [service] * 3, images, names))

    async def main() -> list[bool]:
        async with AsyncClient(url(addresses)) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(60)))

    assert all(asyncio.run(main()))


def test_pictures_are_prepared_beside_the_event_loop(addresses, bundle, tasks_of, picture):
    seen = []

    async def main() -> None:
        async with AsyncClient(f"http://{addresses.http}") as client:
            client._transport = tasks_of(bundle).beside(client._transport)
            await client.ask(picture, task="pets")

    from utune_deploy.serving.client import rows as module

    original = module.prepare

    def watched(*arguments):
        seen.append(threading.current_thread() is threading.main_thread())
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare", watched)
        asyncio.run(main())
    assert seen == [False]
