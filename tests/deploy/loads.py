"""What a load is made of, with defaults: a target of one input, its traffic, and an answer."""

from __future__ import annotations

from utune_deploy.deploy.load.rows import draw_rows
from utune_deploy.deploy.load.target import Target
from utune_deploy.deploy.load.traffic import write_traffic
from utune_deploy.serving.client.address import parse
from utune_deploy.serving.client.calls import ModelFacts

GOOD = {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1.5]}]}


def target_at(url, tasks=(), **inputs):
    inputs = inputs or {"images": ("FP32", (3,))}
    return Target(parse(url), "fake", ModelFacts(8, inputs), tuple(tasks))


def traffic_of(target, **settings):
    settings = {
        "batch": 1,
        "mix": "uniform",
        "encoding": "binary",
        "seed": 0,
        "source": "",
        **settings,
    }
    return write_traffic(target, draw_rows(target, 0), **settings)
