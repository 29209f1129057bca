from __future__ import annotations

import subprocess
import sys
import time

import pytest

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.tasks.claim import claim

HOLD = """
import sys, time
from pathlib import Path
from utune_deploy.serving.tasks.claim import claim
lock = claim(Path(sys.argv[1]))
print("mine", flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_servers_until_it_lets_go(tmp_path):
    folder = tmp_path / "made" / "kept"
    with claim(folder):
        with pytest.raises(UsageError, match="another server keeps its tasks there") as refused:
            claim(folder)
        assert str(folder) in str(refused.value)
        claim(tmp_path / "other").release()
    claim(folder).release()


def test_a_server_that_was_killed_leaves_its_folder_free(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(UsageError, match="another server"):
            claim(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    deadline = time.monotonic() + 10
    while True:
        try:
            claim(tmp_path).release()
            return
        except UsageError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be kept there"):
        claim(tmp_path / "file" / "below")
