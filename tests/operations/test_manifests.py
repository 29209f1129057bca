"""Compose, Kustomize and KServe: valid by their schemas, and in agreement with the server and each other."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "operations/kubernetes"
OVERLAYS = ("cpu", "gpu", "object-store")
RELEASES = ("1.29", "1.37")  # the oldest and the newest that the manifests are held to
CRDS = "UTUNE_CRDS"  # a folder with the definitions of KServe and of the Prometheus operator
NAME = {"app.kubernetes.io/name": "utune-deploy"}


# A small Kustomize: what these files use of it. The real one is compared where kubectl is there.


def merged(base: Any, patch: Any) -> Any:
    """Objects key by key, lists of named things by their names, anything else replaced; null removes."""
    if isinstance(base, dict) and isinstance(patch, dict):
        both = {**base, **{k: merged(base.get(k), v) for k, v in patch.items() if v is not None}}
        return {k: v for k, v in both.items() if k not in patch or patch[k] is not None}
    named = (base, patch) if isinstance(base, list) and isinstance(patch, list) else ()
    if named and all(isinstance(e, dict) and "name" in e for side in named for e in side):
        found = {entry["name"]: entry for entry in base}
        for entry in patch:
            found[entry["name"]] = merged(found.get(entry["name"], {}), entry)
        return list(found.values())
    return copy.deepcopy(patch)


def built(folder: Path, read, yaml, given: list[dict] | None = None) -> list[dict]:
    (layer,) = read(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "labels"}
    assert set(layer) <= known, "the small Kustomize of this test knows less than the file uses"
    objects = copy.deepcopy(given or [])
    for name in layer.get("resources", ()):
        path = (folder / name).resolve()
        objects += built(path, read, yaml) if path.is_dir() else read(path)
    for name in layer.get("components", ()):
        objects = built((folder / name).resolve(), read, yaml, objects)
    for entry in layer.get("patches", ()):
        text = entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text()
        patch = yaml.safe_load(text)
        at = [
            k
            for k, item in enumerate(objects)
            if item["kind"] == patch["kind"]
            and item["metadata"]["name"] == patch["metadata"]["name"]
        ]
        assert len(at) == 1, (folder, patch["kind"])
        if patch.get("$patch") == "delete":
            del objects[at[0]]
        else:
            objects[at[0]] = merged(objects[at[0]], patch)
    for entry in layer.get("labels", ()):
        for item in objects:
            item["metadata"].setdefault("labels", {}).update(entry["pairs"])
    for image in layer.get("images", ()):
        for item in objects:
            for container in containers(item):
                if container["image"].split(":")[0] == image["name"]:
                    name = image.get("newName", image["name"])
                    container["image"] = f"{name}:{image['newTag']}"
    return objects


def containers(item: dict) -> list[dict]:
    pod = item.get("spec", {}).get("template", {}).get("spec", {})
    return pod.get("initContainers", []) + pod.get("containers", [])


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request, read, yaml) -> dict[tuple[str, str], dict]:
    objects = built(KUBERNETES / "overlays" / request.param, read, yaml)
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects)
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_builds_the_same(name: str, read, yaml) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / "overlays" / name],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    def sorted_by_name(objects: Any) -> list[str]:
        # A list of named things is a set to Kubernetes, except for the order of containers.
        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(each) for key, each in value.items()}
            if isinstance(value, list):
                named = all(isinstance(each, dict) and "name" in each for each in value)
                return [plain(e) for e in (sorted(value, key=lambda e: e["name"]) if named else value)]  # fmt: skip
            return value

        return sorted(json.dumps(plain(item), sort_keys=True) for item in objects)

    own = built(KUBERNETES / "overlays" / name, read, yaml)
    assert sorted_by_name(own) == sorted_by_name(yaml.safe_load_all(done.stdout))


# Schemas


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_takes_every_object(overlay, release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install utune-deploy[dev]")
    ours = {item["apiVersion"] for item in overlay.values()} - {"monitoring.coreos.com/v1"}
    assert ours == {"v1", "apps/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1"}
    for item in overlay.values():
        if item["apiVersion"] in ours:
            validate.validate(item, release, strict=True)


RUNTIMES = sorted(path.name for path in (ROOT / "operations/kserve").glob("runtime*.yaml"))


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_s_pod_is_one(read, name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install utune-deploy[dev]")
    (runtime,) = read(ROOT / "operations/kserve" / name)
    spec = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
    for release in RELEASES:
        validate.validate(pod, release, strict=True)


def strict(schema: Any) -> None:
    """Make a schema refuse fields that it does not name, as `kubectl apply` does."""
    if isinstance(schema, dict):
        open_ended = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}
        if "properties" in schema and not open_ended & set(schema):
            schema["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, dict | list):
            strict(value)


def test_kserve_and_the_operator_take_every_object(read) -> None:
    if CRDS not in os.environ:
        pytest.skip(f"{CRDS} names no folder with custom resource definitions")
    jsonschema = pytest.importorskip("jsonschema")
    schemas = {}
    for path in Path(os.environ[CRDS]).glob("*.yaml"):
        for definition in read(path):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = version["schema"]["openAPIV3Schema"]
                strict(schema)
                schema["properties"]["metadata"] = {}  # Kubernetes' own
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schemas[key] = schema
    for path in (ROOT / "operations").rglob("*.yaml"):
        for item in read(path):
            key = (item.get("apiVersion"), item.get("kind"))
            if str(key[0]).startswith(("serving.kserve.io", "monitoring.coreos.com")):
                jsonschema.Draft202012Validator(schemas[key]).validate(item)


def test_compose_takes_its_file(operations: Path) -> None:
    package = pytest.importorskip("compose_spec", reason="pip install utune-deploy[dev]")
    # Compose fills its variables in first.
    text = re.sub(r"\$\{\w+[^}]*\}", "/given", (operations / "compose.yaml").read_text())
    package.PyCompose.from_yaml(text).validate()


# Agreement


def pod_of(overlay: dict) -> dict:
    return overlay["Deployment", "utune-deploy"]["spec"]["template"]["spec"]


def test_selectors_find_the_pods_and_nothing_else(overlay) -> None:
    deployment = overlay["Deployment", "utune-deploy"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == NAME
    # An empty selector is every pod of the namespace, which a schema does not mind.
    assert deployment["selector"]["matchLabels"] == NAME
    assert overlay["NetworkPolicy", "utune-deploy"]["spec"]["podSelector"]["matchLabels"] == NAME
    for kind in ("PodDisruptionBudget", "ServiceMonitor"):
        assert overlay[kind, "utune-deploy"]["spec"]["selector"]["matchLabels"] == NAME
    services = [item for (kind, _), item in overlay.items() if kind == "Service"]
    assert {item["spec"].get("clusterIP") for item in services} == {None, "None"}
    for item in services:
        assert item["spec"]["selector"] == NAME
        assert item["metadata"]["labels"] == NAME
    target = overlay["HorizontalPodAutoscaler", "utune-deploy"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in overlay


def test_ports_and_probes_are_the_server_s(overlay) -> None:
    (server,) = pod_of(overlay)["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for kind, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        get = server[f"{kind}Probe"]["httpGet"]
        assert get == {"path": f"/v2/health/{path}", "port": "http"}
    for (kind, _), item in overlay.items():
        if kind == "Service":
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= set(ports)
    (endpoint,) = overlay["ServiceMonitor", "utune-deploy"]["spec"]["endpoints"]
    service = overlay["Service", "utune-deploy"]["spec"]
    assert endpoint["port"] in {port["name"] for port in service["ports"]}
    headless = overlay["Service", "utune-deploy-grpc"]["spec"]
    assert endpoint["port"] not in {port["name"] for port in headless["ports"]}  # or asked twice


def test_a_pod_has_time_to_answer_what_it_took(overlay, read) -> None:
    fronts = pytest.importorskip("utune_deploy.serving.servers.fronts")
    pod = pod_of(overlay)
    (server,) = pod["containers"]
    word, pause = server["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(pause) + fronts.DRAIN_SECONDS + 5
    (compose,) = read(ROOT / "operations/compose.yaml")
    grace = compose["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= fronts.DRAIN_SECONDS + 5


def test_a_pod_may_do_little(overlay, chain) -> None:
    pod = pod_of(overlay)
    user = chain("server")
    number = [rest for word, rest in user if word == "USER"][-1].split(":")[0]
    assert pod["securityContext"]["runAsUser"] == int(number)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    for container in pod.get("initContainers", []) + pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} == set(container["resources"])


def test_what_is_written_is_a_volume(overlay, chain) -> None:
    pod = pod_of(overlay)
    kinds = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
    assert all(len(kind) == 1 for kind in kinds.values()), "a volume of two kinds"
    (server,) = pod["containers"]
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} <= set(kinds)
    written = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    kept = {rest for word, rest in chain("server") if word == "VOLUME"}
    assert written == kept | {"/tmp"}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}  # fmt: skip
    assert claims == {name for kind, name in overlay if kind == "PersistentVolumeClaim"}


def test_what_the_server_is_told_is_an_option_of_it(overlay, read, dockerfile) -> None:
    from utune_deploy.deploy.verbs.serve import command

    known = {option for parameter in command.params for option in parameter.opts}
    (server,) = pod_of(overlay)["containers"]
    (compose,) = read(ROOT / "operations/compose.yaml")
    (runtime,) = read(ROOT / "operations/kserve/runtime.yaml")
    told = [*server["args"], *compose["services"]["server"]["command"]]
    told += runtime["spec"]["containers"][0]["args"]
    for stage in ("server", "server-gpu"):
        told += json.loads(dict(dockerfile[stage])["CMD"])
    assert {word.split("=")[0] for word in told if word.startswith("--")} <= known
    assert server["args"][0] == "/bundle"


def images() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / "operations").rglob("*.y*ml"))
        for name in re.findall(r"^\s*(?:- )?image: (\S+)", path.read_text(), re.M)
    ]


@pytest.mark.parametrize(("path", "image"), images())
def test_an_image_has_a_tag(path: str, image: str, read) -> None:
    if "kubernetes/" in path:
        layers = [read(KUBERNETES / "overlays" / name / "kustomization.yaml")[0] for name in OVERLAYS]  # fmt: skip
        tagged = {entry["name"]: entry["newTag"] for layer in layers for entry in layer["images"]}
        image = f"{image}:{tagged[image]}"
    _, _, tag = image.rpartition(":")
    assert re.match(r"v?\d+\.\d+\.\d+", tag)
    if "utune-deploy" in image:
        version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
        assert version is not None
        assert tag.split("-")[0] == version[1]


def test_what_compose_mounts_is_there(read, operations: Path) -> None:
    (compose,) = read(operations / "compose.yaml")
    used = set()
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (operations / source).exists(), source
            elif not volume.startswith("$"):
                used.add(source)
        assert "healthcheck" in service
    assert used == set(compose["volumes"])
    grafana = {v.split(":")[1] for v in compose["services"]["grafana"]["volumes"]}
    (provider,) = read(operations / "grafana/provisioning/dashboards/utune.yaml")
    assert f"{provider['providers'][0]['options']['path']}/utune.json" in grafana


def test_every_service_names_a_runtime_that_is_there(read, operations: Path) -> None:
    runtimes = {
        read(operations / "kserve" / name)[0]["metadata"]["name"]: name for name in RUNTIMES
    }
    services = sorted((operations / "kserve").glob("inferenceservice*.yaml"))
    assert len(services) == len(runtimes)
    for path in services:
        model = read(path)[0]["spec"]["predictor"]["model"]
        (runtime,) = read(operations / "kserve" / runtimes[model["runtime"]])
        formats = {entry["name"] for entry in runtime["spec"]["supportedModelFormats"]}
        assert model["modelFormat"]["name"] in formats
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_the_page_names_every_file_and_only_such(operations: Path) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    named = {name.rstrip(".,") for name in re.findall(r"operations/[\w./-]*\w", page)}
    for name in named - {"operations.md"}:
        assert (ROOT / name).exists(), name
    for path in operations.iterdir():
        assert f"operations/{path.name}" in page, path.name
    for target in ("server", "server-gpu", "export", "triton"):
        assert f"`{target}`" in page
