"""The tritonserver that this process is a model of: how it was started, and whether it is up."""

from __future__ import annotations

import contextlib
from pathlib import Path

_LISTENS = "0A"  # a socket's state in /proc/net/tcp


def control_mode(server: int) -> str:
    """Triton's `--model-control-mode`, as the command line of its process says; its default where nothing does."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{server}/cmdline").read_bytes().decode(errors="replace").split("\0")
    mode = "none"
    for word, following in zip(words, (*words[1:], ""), strict=False):
        option, is_given, value = word.partition("=")
        if option == "--model-control-mode":
            mode = value if is_given else following
    return mode


def is_listening(server: int) -> bool:
    """Whether a process listens on a TCP port, as tritonserver does once all is loaded that it loads at its start."""
    process = Path(f"/proc/{server}")
    held = set()
    for link in (process / "fd").glob("*"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            held.add(str(link.readlink()))
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in held:
                    return True
    return False
