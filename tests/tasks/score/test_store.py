"""Score folders: whole or absent, never mixed, never scored twice at once."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from diffguard.errors import DataError
from tasks.score.store import Samples, Store

MADE_BY = {"variant": {"stop": 4}, "images": "abc"}


def table(shard, rows=20):
    ids = [f"{shard}-{number}" for number in range(rows)]
    return pd.DataFrame({"id": ids, "score": np.arange(rows, dtype=float), "split": "test"})


def store(folder, own=True):
    return Store(folder / "scores", folder / "other", folder / "locks", own=own)


def fill(folder, shards=3):
    for shard in range(shards):
        folder.write(shard, table(shard), None, seconds=1.5)


def test_what_is_written_comes_back(tmp_path):
    folder = store(tmp_path).open(MADE_BY, shards=3)
    assert folder.missing() == [0, 1, 2]
    images = np.arange(16, dtype=np.uint8).reshape(2, 1, 2, 4)
    folder.write(1, table(1), Samples(["1-0", "1-5"], images, images + 1, images + 2), seconds=2.0)
    assert folder.missing() == [0, 2]
    with pytest.raises(DataError, match="shard 0 of 3 is missing"):
        folder.read()
    folder.write(0, table(0), None, seconds=1.0)
    folder.write(2, table(2), None, seconds=1.0)
    assert folder.read().equals(pd.concat([table(shard) for shard in range(3)], ignore_index=True))
    assert folder.seconds() == 4.0
    samples = folder.samples()
    assert samples.ids == ["1-0", "1-5"]
    assert np.array_equal(samples.reconstruction, images + 1)


def test_a_damaged_or_foreign_shard_is_named(tmp_path):
    folder = store(tmp_path).open(MADE_BY, shards=1)
    other = store(tmp_path).open({**MADE_BY, "images": "xyz"}, shards=1)
    assert folder.path != other.path
    fill(other, 1)
    (folder.path / "shard-00000.parquet").write_bytes((other.path / "shard-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"shard-00000\.parquet: made by other settings"):
        folder.read()
    (folder.path / "shard-00000.parquet").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"shard-00000\.parquet: not a score shard"):
        folder.read()


def test_finished_work_is_found_by_every_run(tmp_path):
    elsewhere = store(tmp_path, own=False).open(MADE_BY, shards=2)
    assert elsewhere.path.parent == tmp_path / "other"
    fill(elsewhere, 2)
    own = store(tmp_path, own=True).open(MADE_BY, shards=2)
    assert own.path.parent == tmp_path / "scores"
    assert own.missing() == []
    assert store(tmp_path, own=False).open(MADE_BY, shards=2).path == own.path


def test_tidy_puts_away_what_is_no_longer_asked_for(tmp_path):
    keep, old = store(tmp_path).open(MADE_BY, 1), store(tmp_path).open({"variant": "old"}, 1)
    fill(keep, 1)
    fill(old, 1)
    store(tmp_path).tidy([keep])
    assert [path.name for path in (tmp_path / "scores").iterdir()] == [keep.path.name]
    assert not store(tmp_path, own=False).open({"variant": "old"}, 1).missing()


WRITER = """
import sys
from pathlib import Path
from tests.tasks.score.test_store import MADE_BY, store, table
folder = store(Path(sys.argv[1])).open(MADE_BY, shards=500)
print("ready", flush=True)
for shard in range(500):
    folder.write(shard, table(shard, 2000), None, seconds=0.0)
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path):
    for attempt, delay in enumerate((0.05, 0.21, 0.4)):
        place = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        folder = store(place).open(MADE_BY, shards=500)
        missing = folder.missing()
        assert missing == list(range(missing[0], 500))
        for shard in range(missing[0]):
            assert len(folder._open(shard)[0]) == 2000


def test_what_a_killed_writer_has_half_written_of_a_shard_is_removed_by_the_next(tmp_path):
    place = store(tmp_path)
    folder = place.open(MADE_BY, 2)
    for shard in range(2):
        (folder.path / f".shard-{shard:05d}.123-456.parquet").write_bytes(b"half")
    with place.lock([folder], 1, wait=False):
        assert [path.name for path in folder.path.glob(".*")] == [".shard-00000.123-456.parquet"]


HOLDER = """
import sys, time
from pathlib import Path
from tests.tasks.score.test_store import MADE_BY, store, table
place = store(Path(sys.argv[1]))
with place.lock([place.open(MADE_BY, 1)], 0, wait=True):
    print("held", flush=True)
    time.sleep(1.5)
    place.open(MADE_BY, 1).write(0, table(0), None, 0.0)
"""


def test_a_second_run_waits_for_the_shard_and_finds_it_done(tmp_path, capfd):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    place = store(tmp_path)
    folder = place.open(MADE_BY, 1)
    assert folder.missing() == [0]
    assert place.lock([folder], 0, wait=False) is None
    with place.lock([folder], 0, wait=True):
        assert folder.missing() == []
    assert holder.wait() == 0
    assert "waiting for another run" in capfd.readouterr().out
