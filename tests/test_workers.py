"""One job on several machines: real processes on loopback, in folders of their own, that share nothing but a bucket."""

import re
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from chaos_proxy import ChaosProxy
from fake_gcs import fake_gcs_server, free_port, list_objects
from helpers import (
    MODEL,
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
from workers import LOST, read_tf_config


class Job:
    """Workers that were started with the same command, but for what `others` adds to it, and all but the `absent`."""

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
        """Read what a worker prints until it prints this."""
        for line in self.processes[index].stdout:
            if words in line:
                return
        raise AssertionError(self.processes[index].stderr.read())

    def finish(self):
        return [finish(process) for _, process in sorted(self.processes.items())]


def training(result):
    """All of a result that must not depend on how it was computed."""
    metadata = result["metadata"]
    about = ("thresholds_training_output", "thresholds_training_history", "num_images", "num_pixels", "class_folders")
    return result["final_trained_prediction_thresholds"], *(metadata[name] for name in about)


@pytest.mark.parametrize(("number", "factor", "shares"), [(2, 1.0, [6, 5]), (3, 1.0, [4, 4, 3]), (3, 0.1, [1, 1, 0])])
def test_the_result_is_that_of_one_process(tiny_bucket, tmp_path, number, factor, shares):
    """Also where the images cannot be divided, and where there are fewer of them than workers."""
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
    pictures = sorted((tiny_bucket / MODEL).glob("*_slices.png"))
    assert len(pictures) == 2 and pictures[0].read_bytes() == pictures[1].read_bytes()
    assert not [path for folder in job.folders[1:] for path in folder.glob("tmp/counts/*")]

    rerun = Job(tmp_path, [*given, "--optimizing-class-metric", "f1_score"], number)
    for process in rerun.finish():
        assert process.returncode == 0, process.stderr
        assert "no inference needed" in process.stdout and "Counting" not in process.stdout
    assert len(results(tiny_bucket)) == 3


def test_each_worker_fetches_its_share_alone(tiny_bucket, tmp_path):
    with fake_gcs_server() as server, ChaosProxy(server) as proxy:
        upload(server, tiny_bucket, "bkt")
        before = set(list_objects(server, "bkt"))
        for process in Job(tmp_path, arguments("gs://bkt"), 2, STORAGE_EMULATOR_HOST=proxy.url).finish():
            assert process.returncode == 0, process.stderr
        names = [re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in proxy.requests]
        of_the_split = sorted(unquote(name[1]) for name in names if name and unquote(name[1]).startswith(SPLIT))
        assert of_the_split == sorted(name for name in before if name.startswith(SPLIT))
        assert len(set(list_objects(server, "bkt")) - before) == 3
        assert proxy.count("create") == 3


@pytest.fixture
def long_job(tiny_bucket, copied_script):
    """A bucket whose images take a while to count, and a script whose workers lose patience soon."""
    shutil.rmtree(tiny_bucket / SPLIT)
    write_split(tiny_bucket / SPLIT, *blobs_and_masks(600, 64, 96, 2))
    shortened(copied_script, CHECKPOINT_SECONDS=0.5)
    shortened(copied_script.with_name("workers.py"), DEAD_SECONDS=10)
    return tiny_bucket, copied_script


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_ends_the_others_in_time_and_a_rerun_goes_on(long_job, tmp_path, victim):
    bucket, script = long_job
    given = arguments(bucket, batch_size=1)
    job = Job(tmp_path, given, 2, script)
    job.wait_for(1 - victim, "Counting the probabilities of 300 images")
    job.wait_for(victim, "Counting the probabilities of 300 images")
    time.sleep(2)
    job.processes[victim].kill()
    killed = time.monotonic()
    survivor = job.finish()[1 - victim]
    assert time.monotonic() - killed < 10 + 15
    dead = f"worker {victim} ({job.addresses[victim]}) died or cannot be reached"
    assert_one_error_line(survivor, LOST, dead, "start all workers again")
    assert not results(bucket)
    again = Job(tmp_path, given, 2, script).finish()
    for process in again:
        assert process.returncode == 0, process.stderr
    assert "Going on after" in again[1 - victim].stdout
    assert len(results(bucket)) == 1


def test_a_worker_that_never_comes_is_named(tiny_bucket, copied_script, tmp_path):
    shortened(copied_script.with_name("workers.py"), START_SECONDS=10)
    job = Job(tmp_path, arguments(tiny_bucket), 3, copied_script, absent=[2])
    began = time.monotonic()
    for process in job.finish():
        missing = f"worker 2 ({job.addresses[2]}) does not answer (Connection refused)"
        assert_one_error_line(process, LOST, "not all workers came within 10 s", missing)
    assert time.monotonic() - began < 10 + 20
    assert not results(tiny_bucket)


def test_bad_input_that_one_worker_meets_ends_all_with_that_error(tiny_bucket, tmp_path):
    second = sorted((tiny_bucket / SPLIT / "images").iterdir())[1]
    second.write_bytes(second.read_bytes()[:99])
    chief, worker = Job(tmp_path, arguments(tiny_bucket), 2).finish()
    assert_one_error_line(worker, 3, f"{second.name} cannot be decoded")
    assert (chief.returncode, chief.stderr) == (3, worker.stderr)
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
    assert_one_error_line(ended[1 - who], LOST, f"worker {who} ({job.addresses[who]}) was interrupted", "again")
    assert not results(bucket)


def test_workers_with_other_arguments_are_refused(tiny_bucket, tmp_path):
    job = Job(tmp_path, arguments(tiny_bucket), 2, others={1: ["--batch-size", "3"]})
    for process in job.finish():
        assert_one_error_line(process, 2, f"worker 1 ({job.addresses[1]}) has other arguments")
    assert not results(tiny_bucket)


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
    assert read_tf_config(text) == expected


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
    with pytest.raises(ValueError, match="must be like"):
        read_tf_config(text)
    if len(text) < 20:
        assert_one_error_line(run_tool(*arguments("b"), cwd=tmp_path, TF_CONFIG=text), 2, "TF_CONFIG must be like")


def test_the_readme_names_the_times():
    text = " ".join((Path(SCRIPT).parent / "README.md").read_text().split())
    assert f"within {workers.START_SECONDS // 60} minutes" in text
    assert f"within {2 * workers.DEAD_SECONDS // 60} minutes" in text
