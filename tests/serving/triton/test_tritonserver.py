"""What a model reads of the tritonserver that it runs in."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from utune_deploy.serving.triton import tritonserver

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, as Triton's Linux has it"
)


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        (["--model-control-mode=poll"], "poll"),
        (["--model-control-mode", "explicit"], "explicit"),
        (["--other"], "none"),
    ],
)
def test_the_servers_command_line_says_its_mode(words, mode):
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert tritonserver.control_mode(process.pid) == mode
        process.stdin.close()
    assert tritonserver.control_mode(process.pid) == "none"


def test_a_process_is_seen_to_listen():
    code = """
import socket, sys
kind = getattr(socket, sys.argv[1])
with socket.socket(kind) as own:
    own.bind(("::1" if kind == socket.AF_INET6 else "127.0.0.1", 0))
    print(flush=True); sys.stdin.readline()
    own.listen()
    print(flush=True); sys.stdin.readline()
"""
    for kind in ["AF_INET", *(["AF_INET6"] if socket.has_ipv6 else [])]:
        with subprocess.Popen(
            [sys.executable, "-c", code, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:  # fmt: skip
            process.stdout.readline()
            assert not tritonserver.is_listening(process.pid)
            print(file=process.stdin, flush=True)
            process.stdout.readline()
            assert tritonserver.is_listening(process.pid)
            print(file=process.stdin, flush=True)
    assert not tritonserver.is_listening(process.pid)
