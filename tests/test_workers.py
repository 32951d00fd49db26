"""One job on several machines: real processes on loopback, each in another folder, which share only a bucket."""

import math
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import numpy as np
import pytest
from chaos_proxy import ChaosProxy
from fake_gcs import fake_gcs_server, free_port, list_objects
from helpers import (
    SCRIPT,
    SPLIT,
    arguments,
    assert_one_error_line,
    blobs_and_masks,
    finish,
    results,
    run_tool,
    shortened,
    start,
    tf_config,
    upload,
    write_split,
)

import workers
from blobs import Blob
from errors import INPUT, WORKER_LOST, PeerError, UsageError


class Job:
    """Start all workers but the `absent` with the same command; `others` has further arguments by worker."""

    def __init__(self, folder, given, number, script=SCRIPT, absent=(), others=None, **environment):
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(number)]
        self.folders = [folder / f"machine {index}" for index in range(number)]
        self.processes = {}
        for index in set(range(number)) - set(absent):
            self.folders[index].mkdir(exist_ok=True)
            self.processes[index] = start(
                *given,
                *(others or {}).get(index, ()),
                cwd=self.folders[index],
                script=script,
                environment={"TF_CONFIG": tf_config(("worker", index), worker=self.addresses), **environment},
            )

    def wait_for(self, index, words):
        """Read what a worker prints until these words come."""
        for line in self.processes[index].stdout:
            if words in line:
                return
        raise AssertionError(self.processes[index].stderr.read())

    def wait_for_counts(self, index):
        """Wait until a worker has saved a checkpoint."""
        while not list(self.folders[index].glob("tmp/counts/*.partial.npz")):
            assert self.processes[index].poll() is None, self.processes[index].stderr.read()
            time.sleep(0.05)

    def finish(self):
        return [finish(process) for _, process in sorted(self.processes.items())]


def training(result):
    """The parts of a result that must not depend on the number of workers."""
    metadata = result["metadata"]
    about = ("thresholds_training_output", "thresholds_training_history", "num_images", "num_pixels", "class_folders")
    return result["final_trained_prediction_thresholds"], *(metadata[name] for name in about)


@pytest.mark.parametrize(("number", "factor", "shares"), [(2, 1.0, [6, 5]), (3, 0.1, [1, 1, 0])])
def test_the_result_is_that_of_one_process(tiny_bucket, tmp_path, number, factor, shares):
    """Also if the number of images cannot be divided evenly, or is less than the number of workers."""
    given = arguments(tiny_bucket, batch_size=4, dataset_downsample_factor=factor)
    alone = run_tool(*given, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    job = Job(tmp_path, given, number)
    for index, (process, share) in enumerate(zip(job.finish(), shares, strict=True)):
        assert process.returncode == 0, process.stderr
        assert f"This is worker {index} ({job.addresses[index]}) of {number}" in process.stdout
        counting = re.search(r"Counting the probabilities of (\d+) images", process.stdout)
        assert (int(counting[1]) if counting else 0) == share
        assert ("Result: " in process.stdout) == (index == 0)
        assert ("is done: its share is counted" in process.stdout.splitlines()[-1]) == (index > 0)
    first, second = results(tiny_bucket)
    assert training(first) == training(second)
    assert not [path for folder in job.folders[1:] for path in folder.glob("tmp/counts/*")]

    rerun = Job(tmp_path, [*given, "--optimizing-class-metric", "f1_score"], number)
    for process in rerun.finish():
        assert process.returncode == 0, process.stderr
        assert "no inference needed" in process.stdout and "Counting" not in process.stdout
    assert len(results(tiny_bucket)) == 3


def test_each_worker_fetches_only_its_share(tiny_bucket, tmp_path):
    with fake_gcs_server() as server, ChaosProxy(server) as proxy:
        upload(server, tiny_bucket, "bkt")
        before = set(list_objects(server, "bkt"))
        for process in Job(tmp_path, arguments("gs://bkt"), 2, STORAGE_EMULATOR_HOST=proxy.url).finish():
            assert process.returncode == 0, process.stderr
        names = [re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in proxy.requests]
        of_the_split = sorted(unquote(name[1]) for name in names if name and unquote(name[1]).startswith(SPLIT))
        assert of_the_split == sorted(name for name in before if name.startswith(SPLIT))
        assert len(set(list_objects(server, "bkt")) - before) == proxy.count("create") == 4
        listings = [request.path for request in proxy.requests if request.operation == "list"]
        assert len(listings) == len(set(listings)) > 3  # only the chief lists


@pytest.fixture
def long_job(tiny_bucket, copied_script):
    """A bucket whose images take some time to count, and a script whose workers wait only for a short time."""
    shutil.rmtree(tiny_bucket / SPLIT)
    write_split(tiny_bucket / SPLIT, *blobs_and_masks(600, 64, 96, 2))
    shortened(copied_script, CHECKPOINT_SECONDS=0.1)
    shortened(copied_script.with_name("workers.py"), DEAD_SECONDS=10)
    return tiny_bucket, copied_script


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_ends_the_others_and_a_rerun_continues(long_job, tmp_path, victim):
    bucket, script = long_job
    given = arguments(bucket, batch_size=1)
    job = Job(tmp_path, given, 2, script)
    job.wait_for_counts(1 - victim)
    job.processes[victim].kill()
    survivor = job.finish()[1 - victim]
    dead = f"worker {victim} ({job.addresses[victim]}) died or cannot be reached"
    assert_one_error_line(survivor, WORKER_LOST, dead, "start all workers again")
    assert not results(bucket)
    again = Job(tmp_path, given, 2, script).finish()
    for process in again:
        assert process.returncode == 0, process.stderr
    assert "Continuing after" in again[1 - victim].stdout
    assert len(results(bucket)) == 1


@pytest.mark.parametrize("absent", [0, 2])
def test_a_worker_that_never_comes_is_named(tiny_bucket, copied_script, tmp_path, absent):
    shortened(copied_script.with_name("workers.py"), START_SECONDS=10)
    job = Job(tmp_path, arguments(tiny_bucket), 3, copied_script, absent=[absent])
    for process in job.finish():
        missing = f"worker {absent} ({job.addresses[absent]})"
        assert_one_error_line(process, WORKER_LOST, "not all workers came within 10 s", missing)
    assert not results(tiny_bucket)


def test_bad_input_that_one_worker_meets_ends_all_with_that_error(tiny_bucket, tmp_path):
    second = sorted((tiny_bucket / SPLIT / "images").iterdir())[1]
    second.write_bytes(second.read_bytes()[:99])
    chief, worker = Job(tmp_path, arguments(tiny_bucket), 2).finish()
    assert_one_error_line(worker, 3, f"{second.name} cannot be decoded")
    assert_one_error_line(chief, 3, "worker 1 (", worker.stderr.strip().removeprefix("error: "))
    assert not results(tiny_bucket)


def test_bad_input_that_all_workers_meet_is_one_line_of_each(tiny_bucket, tmp_path):
    (tiny_bucket / SPLIT / "masks/class_1/slice_0003.png").unlink()
    for process in Job(tmp_path, arguments(tiny_bucket), 2).finish():
        assert_one_error_line(process, 3, "masks/class_1/slice_0003.png")


@pytest.mark.parametrize("who", [0, 1])
def test_an_interrupted_worker_ends_all(long_job, tmp_path, who):
    bucket, script = long_job
    job = Job(tmp_path, arguments(bucket, batch_size=1), 2, script)
    for index in (0, 1):
        job.wait_for(index, "Counting")
    job.processes[who].send_signal(signal.SIGINT)
    ended = job.finish()
    assert_one_error_line(ended[who], 130, "interrupted")
    assert_one_error_line(ended[1 - who], WORKER_LOST, f"worker {who} ({job.addresses[who]}) was interrupted", "again")
    assert not results(bucket)


def test_workers_with_other_arguments_are_refused(tiny_bucket, tmp_path):
    job = Job(tmp_path, arguments(tiny_bucket), 2, others={1: ["--batch-size", "3"]})
    for process in job.finish():
        assert_one_error_line(process, 2, f"worker 1 ({job.addresses[1]}) has other arguments")
    assert not results(tiny_bucket)


# ---------------------------------------------------------------------------------------------------------------
# What happens in long jobs, with all times made shorter


class ForgetfulNetwork:
    """A proxy before the chief; as soon as it has a `limit`, a connection that was idle for so many seconds is dead."""

    limit = math.inf

    def __init__(self, target):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.target = target
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            one = self.listener.accept()[0]
            try:
                other = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the chief does not listen yet
                one.close()
                continue
            used = [time.monotonic()]
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self.forward, args=(source, sink, used), daemon=True).start()

    def forward(self, source, sink, used):
        while content := source.recv(2**16):
            if time.monotonic() - used[0] > self.limit:
                return  # the connection stays open, so the receiver continues to wait
            used[0] = time.monotonic()
            sink.sendall(content)


def in_two_workers(monkeypatch, chief_does, worker_does, limit=60, **seconds):
    """Return the result or the error of two workers; the second reaches the chief through a ForgetfulNetwork."""
    for name, value in seconds.items():
        monkeypatch.setattr(workers, name, value)
    port = free_port()
    proxy = ForgetfulNetwork(port)
    both_are_there = threading.Barrier(2, lambda: setattr(proxy, "limit", limit))
    outcome = [None, None]

    def work(index, does):
        chief = f"127.0.0.1:{proxy.port if index else port}"
        cluster = workers.Cluster([chief, "127.0.0.1:1"], index, show=lambda line: None)
        try:
            cluster.join()
            both_are_there.wait()
            outcome[index] = does(cluster)
            cluster.leave()
        except PeerError as error:
            outcome[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((chief_does, worker_does))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcome


def test_a_sum_may_wait_longer_than_the_network_remembers(monkeypatch):
    def after(seconds):
        return lambda cluster: time.sleep(seconds) or cluster.sum(np.array([2**62, 1, 2, 3])).tolist()

    for pauses in ((0, 4), (4, 0)):
        both = in_two_workers(monkeypatch, *map(after, pauses), limit=2, LIFE_SECONDS=0.2, DEAD_SECONDS=20)
        assert both == [[-(2**63), 2, 4, 6]] * 2


def test_a_sum_and_what_the_chief_sends_next_do_not_mix(monkeypatch):
    """The chief does not wait for the others in between: a worker may get both before it has taken the first."""

    def does(cluster):
        heard = []
        for i in range(50):
            heard.append(cluster.sum(np.array([i, 1, 2])).tolist())
            heard += cluster.from_chief(lambda i=i: [Blob("b", f"{cluster} {i}", i, "1")], Blob)
        return heard

    chief, worker = in_two_workers(monkeypatch, does, does)
    assert worker == chief
    assert [total[0] for total in chief[::2]] == [2 * i for i in range(50)]


def test_a_worker_that_hangs_is_named(monkeypatch):
    both = in_two_workers(
        monkeypatch,
        lambda cluster: cluster.sum(np.ones(3, np.int64)),
        lambda cluster: time.sleep(5) or cluster.progress(1, 2),
        LIFE_SECONDS=0.2,
        HANG_SECONDS=1,
    )
    assert all(isinstance(error, PeerError) and error.exit_code == WORKER_LOST for error in both)
    assert all("worker 1 (127.0.0.1:1) hangs" in str(error) for error in both)


def test_a_network_that_forgets_is_an_error_not_a_wait(monkeypatch):
    both = in_two_workers(
        monkeypatch,
        lambda cluster: cluster.sum(np.ones(3, np.int64)),
        lambda cluster: time.sleep(2) or cluster.sum(np.ones(3, np.int64)),
        limit=0.5,
        LIFE_SECONDS=100,
        DEAD_SECONDS=3,
    )
    assert any(isinstance(error, PeerError) and "cannot be reached" in str(error) for error in both)


def join(*clusters):
    """Let clusters of this process join, each in a thread."""
    with ThreadPoolExecutor(len(clusters)) as pool:
        for joined in [pool.submit(cluster.join) for cluster in clusters]:
            joined.result(60)


def test_the_others_hear_who_died_before_the_chief_ends():
    """Also on a slow network: a chief that only went away would be named instead."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    code = (
        "import os, socket, sys, time, numpy, workers\n"
        "send, workers.LEAVE_SECONDS = socket.socket.sendall, 20\n"
        "socket.socket.sendall = lambda *arguments: time.sleep(0.1) or send(*arguments)\n"
        "chief = workers.Cluster(sys.argv[1:], end=lambda error: os._exit(error.exit_code))\n"
        "chief.join()\n"
        "chief.sum(numpy.ones(1, int))"
    )
    chief = start("-c", code, *addresses, script="-u", cwd=SCRIPT.parent)
    dies, survives = (workers.Cluster(addresses, index, show=lambda line: None) for index in (1, 2))
    join(dies, survives)
    dies.leave((INPUT, "worker 1: no mask"))
    with pytest.raises(PeerError, match="^worker 1: no mask$"):
        survives.sum(np.ones(1, np.int64))
    assert finish(chief).returncode == INPUT


def test_an_error_of_another_worker_is_raised_also_if_nothing_ends_the_process():
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    chief, worker = (
        workers.Cluster(addresses, index, lambda line: None, end=lambda error: threading.Event().wait())
        for index in range(2)
    )
    join(chief, worker)
    worker.leave((INPUT, "worker 1: no mask"))
    with pytest.raises(PeerError, match="^worker 1: no mask$"):
        chief.sum(np.ones(1, np.int64))


def test_large_counts_are_summed_whole(monkeypatch):
    numbers = np.random.default_rng(0).integers(0, 2**40, 3_000_001)
    for total in in_two_workers(monkeypatch, *[lambda cluster: cluster.sum(numbers)] * 2):
        assert (total == 2 * numbers).all()


# ---------------------------------------------------------------------------------------------------------------
# TF_CONFIG


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (["localhost"], 0)),
        ("", (["localhost"], 0)),
        ("{}", (["localhost"], 0)),
        ('{"task": {"type": "worker", "index": 0}}', (["localhost"], 0)),
        (tf_config(worker=["a:1", "b:2"]), (["a:1", "b:2"], 1)),
        (tf_config(("worker", 0), chief=["c:3"], worker=["a:1"]), (["c:3", "a:1"], 1)),
        (tf_config(("chief", 0), worker=["a:1"], chief=["c:3"]), (["c:3", "a:1"], 0)),
        (tf_config(("worker", "0"), worker=["[::1]:1", "[::1]:2"]), (["[::1]:1", "[::1]:2"], 0)),
    ],
)
def test_the_cluster_is_that_of_tf_config(text, expected):
    assert workers.read_tf_config(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "cluster",
        "[]",
        "[" * 99999,
        '{"cluster": ["a:1"]}',
        '{"cluster": {"worker": ["a:1", "b:2"]}}',
        tf_config(worker=["a", "b"]),
        tf_config(worker=["a:1", "b:99999"]),
        tf_config(worker=["a:1", ":2"]),
        tf_config(worker=["a:1", "a:1"]),
        tf_config(worker=[1, 2]),
        tf_config(worker="a:1"),
        tf_config(("worker", 2), worker=["a:1", "b:2"]),
        tf_config(("chief", 0), worker=["a:1", "b:2"]),
        tf_config(("worker", None), worker=["a:1", "b:2"]),
        tf_config(("worker", 1e999), worker=["a:1", "b:2"]),
        tf_config(worker=["a:1", "b:2"], ps=["c:3"]),
        tf_config(("chief", 1), chief=["a:1", "b:2"]),
    ],
)
def test_a_tf_config_that_cannot_be_is_a_usage_error(text, tmp_path):
    with pytest.raises(UsageError, match="must be like"):
        workers.read_tf_config(text)
    if len(text) < 20:
        assert_one_error_line(run_tool(*arguments("b"), cwd=tmp_path, TF_CONFIG=text), 2, "TF_CONFIG must be like")
