"""One job on a Dask cluster: real schedulers and workers as processes on loopback, and the tool as a user starts it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import free_port
from helpers import (
    ENDINGS,
    MODEL,
    ROOT,
    SPLIT,
    arguments,
    assert_one_error_line,
    finish,
    results,
    run_here,
    run_tool,
    start,
    start_program,
    wait_until,
)
from PIL import Image

from errors import CLUSTER, INPUT, USAGE

SETTINGS = {
    "chunks.CHUNK_PIXELS": 8 * 32 * 64,
    "train_segmentation_model_prediction_thresholds.CHECKPOINT_SECONDS": 0,
    "chunks.LOOK_SECONDS": 0.2,
}
SLOW = """
import os, time, inference
add = inference.Counter.__dict__.get("real_add", inference.Counter.add)  # this module is loaded several times
inference.Counter.real_add = add
def slow(self, batch):
    add(self, batch)
    open("counted", "a").write("x" * len(batch.samples))
    time.sleep(SECONDS)
inference.Counter.add = slow
"""
DEADLY = "import inference, os\ninference.Counter.start = lambda *_: os._exit(9)"
HUNGRY = """
import network
build = network.__dict__.setdefault("real_build", network.build_network)
def hungry(*given):
    tf, model = network.import_tensorflow(), build(*given)
    def hog(p):
        too_much = tf.cast(tf.shape(p)[0] > 2, tf.int64) * 2**50
        return p + tf.reduce_sum(tf.random.uniform([too_much]))
    return tf.keras.Model(model.input, tf.keras.layers.Lambda(hog)(model.output))
network.build_network = hungry
"""


class Cluster:
    """A scheduler, and workers in folders of their own."""

    def __init__(self, folder, scheme="tcp", **environment):
        self.folder = folder
        self.address = f"{scheme}://127.0.0.1:{free_port()}"
        self.environment = {"PYTHONPATH": ROOT, **environment}
        ttl = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s"}
        self.scheduler = self._start("scheduler", folder, "--host", self.address, "--no-dashboard", **ttl)

    def worker(self, name="worker", preload="", **environment):
        """Start a worker, with Python code that it runs before; returns the process and its folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "preload.py").write_text(preload)
        limits = ("--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--local-directory", "tmp/dask")
        given = (self.address, *limits, "--preload", "preload.py")
        return self._start("worker", folder, *given, **environment), folder

    def _start(self, *command, **environment):
        kind, folder, *given = command
        with open(folder / f"{kind}.log", "a") as log:
            return start_program(
                *(sys.executable, "-m", "dask", kind, *given),
                cwd=folder,
                environment=self.environment | environment,
                stdout=log,
                stderr=log,
            )


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def command(cluster, bucket, folder, settings=None, **given):
    """Start the documented command on a cluster, from a folder of its own."""
    folder.mkdir(exist_ok=True)
    given = arguments(bucket, **{"batch_size": 4} | given)
    environment = cluster.environment | {"DASK_SCHEDULER_ADDRESS": cluster.address}
    return start(*given, cwd=folder, settings=SETTINGS | (settings or {}), environment=environment)


def outcome(bucket):
    """The parts of the newest result that must not depend on who counts, and its YAML."""
    result = results(bucket)[-1]
    metadata, folder = result["metadata"], bucket / MODEL
    about = ("thresholds_training_output", "thresholds_training_history", "num_images", "num_pixels")
    stem = f"model_thresholds_{metadata['created_datetime']}"
    files = [(folder / f"{stem}{ending}").read_bytes() for ending in ENDINGS if ending != ".yaml"]
    return [result["final_trained_prediction_thresholds"], *(metadata[name] for name in about), *files], result


@pytest.fixture
def bucket(many_images, tmp_path):
    template, _ = many_images
    return Path(shutil.copytree(template, tmp_path / "bucket"))


@pytest.fixture
def alone(many_images):
    """The outcome of one process."""
    return outcome(many_images[0].parent / "bucket")[0]


def counted(folder):
    """How many images a slow worker has counted."""
    path = folder / "counted"
    return path.stat().st_size if path.exists() else 0


def same(process, bucket, alone):
    """Check that a run ended well, with the numbers and figures of one process; returns its YAML."""
    process = finish(process)
    assert process.returncode == 0, process.stderr
    ours, result = outcome(bucket)
    assert ours == alone
    return result


def test_workers_that_halve_a_batch_or_come_late(cluster, bucket, tmp_path, alone):
    cluster.worker("hungry", HUNGRY)
    _, folder = cluster.worker("slow", SLOW.replace("SECONDS", "0.1"))
    process = command(cluster, bucket, tmp_path / "command")
    wait_until(lambda: counted(folder) > 8, process)
    cluster.worker("late")
    result = same(process, bucket, alone)
    ways = result["metadata"]["counted_with"]
    assert sum(way["images"] for way in ways) == 120
    assert {way["batch_size"] for way in ways} >= {2, 4}
    (warning,) = [line for line in result["metadata"]["warnings"] if "does not fit into memory" in line]
    assert "a batch of 4 images does not fit into memory: continuing with 2" in warning


@pytest.mark.parametrize("fate", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_dies_or_stops_in_the_middle_of_a_chunk(cluster, bucket, tmp_path, alone, fate):
    victim, folder = cluster.worker("victim", SLOW.replace("SECONDS", "0.3"))
    process = command(cluster, bucket, tmp_path / "command")
    wait_until(lambda: counted(folder) > 12, process)
    os.killpg(victim.pid, fate)
    _, folder = cluster.worker("other", SLOW.replace("SECONDS", "0.05"))
    wait_until(lambda: counted(folder) > 96, process)  # also what the victim had
    os.killpg(victim.pid, signal.SIGCONT)
    same(process, bucket, alone)


@pytest.mark.slow
def test_a_cluster_continues_what_one_process_began(cluster, bucket, tmp_path, alone):
    cluster.worker()
    folder = tmp_path / "command"
    folder.mkdir()
    given = arguments(bucket, batch_size=4)
    process = start(*given, cwd=folder, settings=SETTINGS)
    wait_until(lambda: list(folder.glob("tmp/counts/*.npz")), process)
    process.kill()
    process = command(cluster, bucket, folder)
    same(process, bucket, alone)
    rerun = run_tool(*given, cwd=folder, settings=SETTINGS, DASK_SCHEDULER_ADDRESS="tcp://127.0.0.1:1")
    assert rerun.returncode == 0 and "no inference needed" in rerun.stdout


@pytest.mark.parametrize("seconds, images", [("0.2", 24), pytest.param("60", 0, marks=pytest.mark.slow)])
def test_a_scheduler_that_is_lost(cluster, bucket, tmp_path, alone, seconds, images):
    """In the middle of the job, and before its first chunk is counted."""
    _, folder = cluster.worker("slow", SLOW.replace("SECONDS", seconds))
    process = command(cluster, bucket, tmp_path / "command")
    wait_until(lambda: counted(folder) > images, process)
    cluster.scheduler.kill()
    assert_one_error_line(finish(process), CLUSTER, cluster.address, "lost", "run the same command again")
    assert not results(bucket)
    process = start(*arguments(bucket, batch_size=4), cwd=tmp_path / "command", settings=SETTINGS)
    same(process, bucket, alone)


def test_there_is_no_worker(cluster, bucket, tmp_path):
    settings = {"chunks.REMIND_SECONDS": 1, "chunks.GIVE_UP_SECONDS": 4}
    process = finish(command(cluster, bucket, tmp_path / "command", settings))
    assert_one_error_line(process, CLUSTER, "no worker", "start workers")
    assert f"warning: {cluster.address} has no worker" in process.stderr


@pytest.mark.slow
def test_a_worker_that_hangs_is_named(cluster, bucket, tmp_path):
    pause = "3 if os.path.getsize('counted') < 96 else 1000"  # first it counts for longer than the patience
    _, folder = cluster.worker("hanging", SLOW.replace("SECONDS", pause))
    process = command(cluster, bucket, tmp_path / "command", {"chunks.GIVE_UP_SECONDS": 30})
    assert_one_error_line(finish(process), CLUSTER, "no chunk was counted", "tcp://127.0.0.1:")
    assert counted(folder) >= 96


@pytest.mark.slow
def test_a_chunk_that_kills_every_worker(cluster, bucket, tmp_path):
    cluster.worker("deadly", DEADLY)
    process = command(cluster, bucket, tmp_path / "command")
    assert_one_error_line(
        finish(process), CLUSTER, "took the images slice_00", ".png to slice_0", "died, 4 times", "memory"
    )


def test_a_worker_with_other_code(cluster, bucket, tmp_path):
    shutil.copytree(ROOT, tmp_path / "code", ignore=lambda folder, names: {n for n in names if not n.endswith(".py")})
    with open(tmp_path / "code/models.py", "a") as file:
        file.write("# another line\n")
    cluster.worker(PYTHONPATH=tmp_path / "code")
    process = command(cluster, bucket, tmp_path / "command")
    assert_one_error_line(finish(process), CLUSTER, "worker tcp://", "another version of the tool's code")


def test_a_scheduler_without_the_code(bucket, tmp_path):
    cluster = Cluster(tmp_path, PYTHONPATH="")
    cluster.worker()
    process = finish(command(cluster, bucket, tmp_path / "command"))
    assert_one_error_line(process, CLUSTER, cluster.address, "No module named 'chunks'", "PYTHONPATH")


def test_all_files_that_cannot_be_used_are_named_once(cluster, bucket, tmp_path):
    cluster.worker("first")
    cluster.worker("second")
    broken = [bucket / SPLIT / "masks/class_1" / f"slice_{i:04d}.png" for i in (3, 50, 119)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    soft = bucket / SPLIT / "masks/class_0/slice_0000.png"
    Image.fromarray(np.arange(32 * 64, dtype=np.uint8).reshape(32, 64)).save(soft)
    process = finish(command(cluster, bucket, tmp_path / "command"))
    assert_one_error_line(process, INPUT, "3 files cannot be used", "slice_0003.png", "slice_0050.png")
    (listed,) = (tmp_path / "command/tmp").glob("problems_*.txt")
    lines = sorted(listed.read_text().splitlines())  # they come as the workers find them
    assert all(path.name in line for path, line in zip(broken, lines, strict=True))


def test_an_error_on_a_worker_is_the_commands_own(cluster, bucket, tmp_path):
    cluster.worker()
    (bucket / MODEL / "model.hdf5").write_bytes(b"PK\x03\x04")
    process = finish(command(cluster, bucket, tmp_path / "command"))
    assert_one_error_line(process, INPUT, "model.hdf5")


@pytest.mark.slow
def test_an_interruption_stops_the_workers_within_the_chunk(cluster, bucket, tmp_path):
    _, folder = cluster.worker("slow", SLOW.replace("SECONDS", "0.5"))
    settings = {"chunks.CHUNK_PIXELS": 64 * 32 * 64}
    process = command(cluster, bucket, tmp_path / "command", settings, batch_size=1)
    wait_until(lambda: counted(folder) > 1, process)
    process.send_signal(signal.SIGINT)
    assert_one_error_line(finish(process), 128 + signal.SIGINT, "interrupted")
    before = -1
    while before != counted(folder):  # until two looks find the same
        before = counted(folder)
        time.sleep(2)
    assert counted(folder) < 32


def certificate(folder, name, authority=None):
    """Make a key and a certificate with openssl, signed by an authority or by itself."""
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    make = ["openssl", "req", "-x509", *options.split(), "-subj", f"/CN={name}", "-keyout", key, "-out", cert]
    if authority:
        make += ["-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key"]
    subprocess.run(make, check=True, capture_output=True)
    return {"KEY": key, "CERT": cert}


def test_two_jobs_at_once_over_tls(bucket, tmp_path, alone):
    certificate(tmp_path, "authority")
    own = certificate(tmp_path, "cluster", "authority")
    tls = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": tmp_path / "authority.pem"}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        tls |= {f"DASK_DISTRIBUTED__COMM__TLS__{role}__{kind}": path for kind, path in own.items()}
    tls["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    given = arguments("bucket", batch_size=4)
    cluster = Cluster(tmp_path, "tls", **tls)
    cluster.worker()
    named = {"DASK_SCHEDULER_ADDRESS": cluster.address}
    process = run_tool(*given, cwd=tmp_path, settings=SETTINGS, **named)
    assert_one_error_line(process, CLUSTER, cluster.address, "no certificate")
    beside = Path(shutil.copytree(bucket, tmp_path / "beside"))
    process = start(*given, cwd=tmp_path, settings=SETTINGS, environment=named | tls)
    other = command(cluster, beside, tmp_path / "command", dataset_downsample_factor=0.5)
    same(process, bucket, alone)
    assert finish(other).returncode == 0 and results(beside)[0]["metadata"]["num_images"] == 60


def test_dask_is_imported_only_where_a_scheduler_is_named(tiny_bucket, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/dask.py").write_text("raise SystemExit('dask was imported')")
    home = tmp_path / "home"
    process = run_tool(*arguments(tiny_bucket), cwd=tmp_path, PYTHONPATH=tmp_path / "code", HOME=home)
    assert process.returncode == 0, process.stderr
    (home / ".config/dask").mkdir(parents=True)
    (home / ".config/dask/mine.yaml").write_text("scheduler-address: tcp://127.0.0.1:1")
    shutil.rmtree(tmp_path / "tmp")
    process = run_tool(*arguments(tiny_bucket), cwd=tmp_path, HOME=home, settings={"chunks.CONNECT_SECONDS": 1})
    assert_one_error_line(process, CLUSTER, "tcp://127.0.0.1:1 cannot be reached")


def test_tf_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}}')
    assert_one_error_line(run_here(*arguments("bucket"), cwd=tmp_path), USAGE, "TF_CONFIG", "docs/large_jobs.md")


@pytest.mark.slow
def test_an_idle_worker_gives_the_gpu_back(cluster, bucket, tmp_path, alone):
    """Its process ends, and its nanny starts another one."""
    _, folder = cluster.worker("idle", "import chunks\nchunks.IDLE_SECONDS = 1\n")
    process = command(cluster, bucket, tmp_path / "command")
    same(process, bucket, alone)
    log = folder / "worker.log"
    deadline = time.monotonic() + 60
    while log.read_text().count("Start worker at") < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    bucket = Path(shutil.copytree(bucket, tmp_path / "another bucket"))
    process = command(cluster, bucket, tmp_path / "another command")
    same(process, bucket, alone)
