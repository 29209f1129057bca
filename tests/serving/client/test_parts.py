"""What needs no server: addresses, waits, lines of errors, and what the package loads."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.no_class import NO_CLASS
from utune_deploy.serving.client import Client, Retry
from utune_deploy.serving.client.address import parse
from utune_deploy.serving.client.answers import _own
from utune_deploy.serving.client.calls import model_facts
from utune_deploy.serving.client.failures import FINAL, LOST, REFUSED, seconds
from utune_deploy.serving.rejections import InvalidRequest, from_line, one_line


def test_the_client_loads_neither_torch_nor_a_runtime():
    code = (
        "import sys; import utune_deploy.serving.client as c; import tritonclient.http, tritonclient.grpc; "
        "c.Client('http://localhost').close(); c.Client('grpc://localhost').close(); "
        "print([m for m in ('torch', 'onnxruntime', 'timm', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost", "http://localhost:8000"),
        ("grpc://localhost", "grpc://localhost:8001"),
        ("https://example.org/models/", "https://example.org:443/models"),
        ("grpcs://[::1]:9", "grpcs://[::1]:9"),
    ],
)
def test_addresses(url, said):
    address = parse(url)
    assert str(address) == said
    assert address.is_grpc == url.startswith("grpc")
    assert address.is_secure == ("s://" in url)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://a:70000",
        "grpc://a/b",
        "http://a?b=c",
        "http://u:p@a",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match="no address"):
        Client(url)


def test_waits_grow_spread_and_end():
    retry = Retry(attempts=9, first_s=1.0, longest_s=4.0)
    for attempt, ceiling in ((1, 1), (2, 2), (3, 4), (8, 4)):
        waits = [retry.wait_s(attempt, None) for _ in range(200)]
        assert 0 <= min(waits) < 0.2 * ceiling
        assert 0.8 * ceiling < max(waits) <= ceiling
    assert 7.0 <= retry.wait_s(1, 7.0) <= 8.0


@pytest.mark.parametrize(
    ("attempt", "kind", "repeatable", "again"),
    [
        (1, REFUSED, False, True),
        (1, LOST, True, True),
        (1, LOST, False, False),
        (1, FINAL, True, False),
        (3, REFUSED, True, False),
    ],
)
def test_what_is_asked_again(attempt, kind, repeatable, again):
    assert Retry(attempts=3).allows(attempt, kind, repeatable) == again


@pytest.mark.parametrize("settings", [{"attempts": 0}, {"first_s": -1}, {"longest_s": -1}])
def test_retries_that_make_no_sense(settings):
    with pytest.raises(UsageError, match="make no sense"):
        Retry(**settings)


def test_retry_after_is_a_number_or_a_date():
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert seconds("2") == 2.0
    assert seconds("-2") == 0.0
    assert 28 < (seconds(format_datetime(later, usegmt=True)) or 0) <= 30
    assert seconds("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0
    assert seconds(None) is None
    assert seconds("soon") is None


_TEXT = st.text(st.characters(codec="ascii", exclude_characters=";:()\n"), min_size=1)


@given(_TEXT, st.dictionaries(st.sampled_from(["where", "wanted", "found", "do"]), _TEXT))
def test_an_errors_line_is_read_back(what, details):
    error = InvalidRequest(what, **details)
    assert from_line(one_line(error)) == (what, error.details)


@pytest.mark.parametrize("line", ["", "no (such) luck", "upstream (connect error)", "a (where"])
def test_a_foreign_line_is_a_sentence(line):
    assert from_line(line) == (line, {})


def test_details_may_hold_brackets_and_semicolons():
    error = InvalidRequest("no", wanted="[n, 3] (or less); more", found="x: (y)")
    assert from_line(one_line(error)) == ("no", error.details)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_columns_of_classes_that_a_task_does_not_have_are_no_logits(dtype, shape):
    lowest = max(NO_CLASS, torch.finfo(dtype).min)
    row = np.full(shape, torch.tensor(lowest, dtype=dtype).float().numpy())
    row[..., :2] = -1e4
    np.testing.assert_array_equal(_own(row), row[..., :2])


@pytest.mark.parametrize(
    ("more", "hands_over"),
    [
        ({}, False),
        ({"backend": "python"}, False),  # somebody else's model
        ({"backend": "onnxruntime", "parameters": {"identity": {}}}, False),
        ({"backend": "python", "parameters": {"identity": {}}}, True),
    ],
)
def test_our_model_in_triton_is_known_by_its_configuration(more, hands_over):
    assert model_facts({"max_batch_size": 4, "input": [], **more}).hands_over is hands_over
