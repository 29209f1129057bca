"""The service on several replicas: a real Ray cluster of several nodes on this machine, two of one processor each."""

from __future__ import annotations

import hashlib
import threading
import time

import numpy as np
import pytest

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UtuneError
from utune_deploy.serving.client import Client, Retry
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.service import Service

pytest.importorskip("ray.serve", reason="needs the extra `ray`")

pytestmark = [
    # Ray's own code warns of what Python and its libraries will no longer have.
    pytest.mark.filterwarnings("ignore"),
]

CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


@pytest.fixture(scope="module")
def cluster():
    """Two machines, as far as Ray can tell."""
    import ray
    from ray.cluster_utils import Cluster

    from utune_deploy.serving.servers.ray import NAMESPACE, library

    library.ray()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    ray.init(
        address=made.address, namespace=NAMESPACE, configure_logging=False, log_to_driver=False
    )
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def front(cluster, threaded):
    """`with front(bundle, **settings) as addresses`: a front in a thread of this process."""
    from utune_deploy.serving.servers.ray import running

    return lambda bundle, **settings: threaded(
        running(bundle, device=Device(threads=1), **settings)
    )


@pytest.fixture(scope="module")
def two_fronts(front, banked):
    """Two replicas behind two fronts."""
    from utune_deploy.serving.servers.ray import Scale

    with (
        front(banked, scale=Scale(replicas=2)) as first,
        front(banked, scale=Scale(replicas=2)) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def reference(banked):
    return Service.open(banked, Device(threads=1))


ONCE = Retry(attempts=1)


def _clients(addresses) -> list[Client]:
    """Clients that ask once."""
    urls = [f"http://{a.http}" for a in addresses] + [f"grpc://{a.grpc}" for a in addresses]
    return [Client(url, retry=ONCE) for url in urls]


def _right(answers, wanted, tasks) -> bool:
    return all(
        answer.task == task
        and np.allclose(answer.logits, logits[: len(answer.logits)], rtol=1e-4, atol=1e-4)
        for answer, logits, task in zip(answers, wanted, tasks, strict=True)
    )


class Load:
    """Threads that ask mixed requests through both fronts, and count what is lost and what is wrong."""

    def __init__(self, addresses, reference, rows) -> None:
        self.asked, self.lost, self.wrong = 0, [], []
        self._done = threading.Event()
        self._cases = []
        for seed in range(6):
            images, tasks = rows(1 + seed % 4, seed=seed)
            self._cases.append((images, tasks, reference.answer(images, tasks).logits))
        self._clients = _clients(addresses)
        self._threads = [threading.Thread(target=self._ask, args=(c,)) for c in self._clients]

    def _ask(self, client: Client) -> None:
        number = 0
        while not self._done.is_set():
            images, tasks, wanted = self._cases[number % len(self._cases)]
            number += 1
            try:
                answers = client.ask_many({"images": images}, tasks=tasks)
            except Exception as error:
                self.lost.append(error)
            else:
                if not _right(answers, wanted, tasks):
                    self.wrong.append(tasks)
            self.asked += 1

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        for client in self._clients:
            client.close()


def _on_every_replica(method, *given) -> list:
    """What those say that live; Ray learns late of one that died."""
    from ray import serve

    from utune_deploy.serving.servers.ray.keeper import DEPLOYMENT

    handle = serve.get_deployment_handle(DEPLOYMENT, "utune-tiny")
    said = handle.broadcast(method, *given).results(timeout_s=30, return_exceptions=True)
    return [each for each in said if not isinstance(each, BaseException)]


def test_mixed_requests_are_answered_as_in_this_process(two_fronts, reference, rows):
    for client in _clients(two_fronts):
        with client:
            for seed in range(8):
                images, tasks = rows(1 + seed % 8, seed=seed)
                answers = client.ask_many({"images": images}, tasks=tasks)
                assert _right(answers, reference.answer(images, tasks).logits, tasks)
            with pytest.raises(InvalidRequest, match="unknown task"):
                client.ask({"images": images[0]}, task="dogs")


def test_tasks_change_on_every_replica_at_once_while_others_are_asked(
    two_fronts, reference, rows, packed
):
    images, _ = rows(1, seed=3)
    first, second = (Client(f"http://{a.http}", retry=ONCE) for a in two_fronts)
    wanted = {}
    for seed in (1, 2):
        service = Service.open(reference.registry.bundle, Device(threads=1))
        service.add(packed("birds", seed=seed))
        wanted[seed] = service.answer(images, ["birds"]).logits
        service.close()

    def says(client: Client, seed: int) -> bool:
        return _right([client.ask({"images": images[0]}, task="birds")], wanted[seed], ["birds"])

    with Load(two_fronts, reference, rows) as load, first, second:
        assert first.add(packed("birds", seed=1)).version == 1
        assert says(first, 1)
        assert says(second, 1)
        assert second.update(packed("birds", seed=2)).versions == (1, 2)
        assert says(first, 2)
        assert says(second, 2)
        with pytest.raises(UtuneError, match="does not answer as the task does in torch"):
            first.update(packed("birds", seed=3, right=False))
        assert says(first, 2)
        assert first.use("birds", 1).version == 1
        assert says(second, 1)
        assert second.pin("birds").pinned
        assert not first.unpin("birds").pinned
        first.remove("birds")
        for client in (first, second):
            with pytest.raises(InvalidRequest, match="unknown task"):
                client.ask({"images": images[0]}, task="birds")
        first.add(packed("birds", seed=2))  # for the tests below
        assert [task.name for task in second.tasks()] == [*CLASSES, "birds"]
    assert load.asked > 20
    assert not load.wrong
    assert not load.lost


def test_every_replica_says_that_it_is_well(two_fronts):
    assert _on_every_replica("check_health") == [None, None]


def test_a_node_that_dies_under_load_loses_no_request(cluster, two_fronts, reference, rows):
    with Load(two_fronts, reference, rows) as load:
        time.sleep(1)
        cluster.remove_node(cluster.second, allow_graceful=False)
        time.sleep(4)
        asked = load.asked
        time.sleep(1)
    assert load.asked > asked
    assert not load.wrong
    assert not load.lost


def test_a_replica_that_starts_later_has_the_tasks(cluster, two_fronts, reference, rows, packed):
    from utune_deploy.serving.servers.ray.messages import Ask, Key

    cluster.add_node(num_cpus=1)
    deadline = time.monotonic() + 60
    while len(_on_every_replica("resident")) < 2:
        assert time.monotonic() < deadline, "no second replica"
        time.sleep(0.2)
    data = packed("birds", seed=2)
    key = Key("birds", 2 + 1, hashlib.sha256(data).hexdigest() + ".task")
    images, _ = rows(1, seed=3)
    replies = _on_every_replica("answer", Ask((key,)), {"images": images})
    service = Service.open(reference.registry.bundle, Device(threads=1))
    service.add(data)
    for reply in replies:
        np.testing.assert_allclose(
            reply.logits, service.answer(images, ["birds"]).logits, rtol=1e-4, atol=1e-4
        )
    service.close()
