"""A disk that is full: one line, and what was there before is whole."""

import json
import os
import subprocess
import sys

import pytest

from diffguard.errors import DataError
from tasks.common.files import write_json

LIMITED = """
import resource, signal, sys
from tasks.common.console import run_stage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may be longer, as where a disk is full
{work}
"""
WORK = {
    "json": "from pathlib import Path; from tasks.common.files import write_json\n"
    "run_stage(lambda: write_json(Path(sys.argv[1]), list(range(1000))))",
    "directly": "import shutil; file = open(sys.argv[1] + '.new', 'wb', buffering=0)\n"
    "run_stage(lambda: [file.write(b'x' * 900) for _ in range(3)])",
}


@pytest.mark.parametrize("work", WORK)
def test_a_stage_ends_with_one_line_and_leaves_what_was_there(work, tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, [1])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(work=WORK[work]), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "cannot be written (File too large); make room" in line
    assert json.loads(path.read_text()) == [1]
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_real_disk_that_is_full(tmp_path):
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(DataError, match=r"a\.json: cannot be written \(No space left on device\); make room"):
            write_json(tmp_path / "a.json", list(range(100_000)))
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
