"""Rules, dashboard and autoscaler ask for metrics and labels that the server gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from utune_deploy.serving.watching.metrics import METRICS, SUFFIXES

SERIES = {
    name + suffix: (family.kind, {*family.labels} | ({"le"} if suffix == "_bucket" else set()))
    for name, family in METRICS.items()
    for suffix in SUFFIXES[family.kind]
}
SERIES["up"] = ("gauge", set())
SCRAPED = {"job", "instance", "namespace", "pod"}  # labels that whoever asks for metrics adds
VALUES = {"outcome": {"answered", "refused", "failed"}, "state": {"used", "free"}, "action": {"add", "update", "remove", "rollback"}}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "operations/grafana/utune.json").read_text())
SOURCES = (
    "operations/rules.yaml",
    "operations/kubernetes/prometheus-adapter.yaml",
    "operations/grafana/utune.json",
)


def plain(query: str) -> str:
    """A query with what Grafana and the adapter fill in filled in."""
    query = query.replace("$__rate_interval", "5m").replace("<<.GroupBy>>", "pod")
    return query.replace("<<.LabelMatchers>>", 'pod="one"')


@pytest.fixture(scope="session")
def queries(read) -> list[str]:
    rules, adapter = (read(ROOT / source)[0] for source in SOURCES[:2])
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for rule in adapter["rules"]["custom"]:
        found += [rule["seriesQuery"], rule["metricsQuery"]]
    found += [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]  # fmt: skip
    return [plain(query) for query in found]


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_of_a_metric_is_one_of_the_server_s(source: str) -> None:
    text = (ROOT / source).read_text()
    text = text.replace("utune_queue_microseconds", "")  # what the adapter calls its own
    found = set(re.findall(r"\b(?:nv|utune)_[a-z_]+", text))
    assert found
    assert found <= set(SERIES)


def test_every_query_parses_and_its_labels_exist(queries: list[str]) -> None:
    promql = pytest.importorskip("promql_parser", reason="pip install utune-deploy[dev]")
    for query in queries:
        labels: set[str] = set()
        known = set(SCRAPED)

        def look(node: Any, query=query, labels=labels, known=known) -> None:
            if isinstance(node, promql.MatrixSelector):
                # What the walk leaves out; a rate is of a counter.
                name = look(node.vector_selector)
                assert SERIES[node.vector_selector.name][0] != "gauge", (query, name)
            if isinstance(node, promql.VectorSelector):
                assert node.name in SERIES, query
                own = SERIES[node.name][1] | SCRAPED
                known.update(own)
                for matcher in node.matchers.matchers:
                    assert matcher.name in own, (query, matcher.name)
                    if matcher.name in VALUES:
                        assert matcher.value in VALUES[matcher.name], query
            if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
                labels.update(node.modifier.labels)

        promql.walk(promql.parse(query), look)
        assert labels <= known, query


def test_counters_are_asked_for_their_rate(queries: list[str]) -> None:
    for query in queries:
        for name, (kind, _) in SERIES.items():
            bare = rf"(?<!rate\()(?<!absent\()\b{name}\b(?!\{{namespace)"
            if kind != "gauge":
                assert not re.search(bare, query), query


def test_every_series_of_ours_is_watched_somewhere() -> None:
    text = "".join((ROOT / source).read_text() for source in SOURCES)
    unwatched = {name for name in METRICS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)}  # fmt: skip
    # Triton's total is the sum of its parts, and the histogram says more.
    assert unwatched == {"nv_inference_request_duration_us"}


def test_the_operator_s_rules_are_prometheus_s(read) -> None:
    plain_rules = read(ROOT / SOURCES[0])[0]
    (operators,) = read(ROOT / "operations/kubernetes/components/monitoring/rules.yaml")
    assert operators["spec"] == plain_rules


def test_every_alert_says_what_and_how_bad(read) -> None:
    names = set()
    for group in read(ROOT / SOURCES[0])[0]["groups"]:
        for rule in group["rules"]:
            names.add(rule["alert"])
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}
            used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"]))
            aggregated = re.search(r"by \(([^)]*)\)", rule["expr"])
            if aggregated:
                assert used <= set(re.split(r",\s*", aggregated[1])), rule["alert"]
    assert len(names) == sum(len(g["rules"]) for g in read(ROOT / SOURCES[0])[0]["groups"])


def test_the_autoscaler_asks_for_what_the_adapter_gives(read) -> None:
    (scaler,) = read(ROOT / "operations/kubernetes/base/autoscaler.yaml")
    adapter = read(ROOT / SOURCES[1])[0]
    given = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    assert {entry["pods"]["metric"]["name"] for entry in scaler["spec"]["metrics"]} <= given


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_dashboard_uses_its_variables_and_no_other() -> None:
    defined = {entry["name"] for entry in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == defined


def test_prometheus_asks_the_server_where_compose_puts_it(read) -> None:
    (config,) = read(ROOT / "operations/prometheus.yml")
    (compose,) = read(ROOT / "operations/compose.yaml")
    job = config["scrape_configs"][0]
    assert job["job_name"] == "utune-deploy"  # the alerts and the dashboard name it
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"]
    assert port == "8002"
    mounted = "".join(compose["services"]["prometheus"]["volumes"])
    for name in config["rule_files"]:
        assert (ROOT / "operations" / name).is_file()
        assert f"/etc/prometheus/{name}" in mounted
