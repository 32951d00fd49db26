"""What must not get slow or large: imports, fetching beside inference, memory. benchmark.py measures times."""

import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import yaml
from helpers import (
    SCRIPT,
    SPLIT,
    GoogleBucket,
    arguments,
    blobs_and_masks,
    finish,
    shortened,
    start,
    whole_results,
    write_split,
)


def imported(*given, cwd):
    """Names of the modules that a run imports."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, *given], cwd=cwd, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return set(re.findall(r"(?m)^import time:.*\| +(\S+)$", process.stderr))


def test_nothing_heavy_is_imported_for_help(tmp_path):
    loaded = imported("--help", cwd=tmp_path)
    assert "numpy" in loaded
    assert not loaded & {
        "tensorflow",
        "matplotlib",
        "scipy",
        "h5py",
        "pandas",
        "gcsfs",
        "google.cloud",
    }
    assert os.listdir(tmp_path) == []


def test_a_rerun_imports_nothing_that_only_inference_needs(counted):
    loaded = imported(*arguments("bucket"), cwd=counted)
    assert "matplotlib.figure" in loaded
    assert not loaded & {"tensorflow", "segmentation_models", "h5py", "pandas", "gcsfs", "matplotlib.pyplot"}


def test_fetching_overlaps_inference(many_images, proxy, copied_script, tmp_path):
    """The server holds the last image back until something was counted."""
    bucket = GoogleBucket(proxy, many_images[0], "overlaps")
    shortened(copied_script, CHECKPOINT_SECONDS=0.01)
    shortened(copied_script.with_name("gcp_utils.py"), SOCKET_SECONDS=300, RETRY_SECONDS=300)
    held, go = [], threading.Event()

    def draw(method, path, draw=proxy.draw):
        if "slice_0119.png" in path and "images" in path and "alt=media" in path:
            held.append(go.wait(240))
        return draw(method, path)

    proxy.draw = draw
    work = tmp_path / "work"
    work.mkdir()
    process = start(
        *arguments(bucket.address, batch_size=1), cwd=work, script=copied_script, environment=bucket.environment
    )
    while process.poll() is None and not go.wait(0.01):
        if list(work.glob("tmp/counts/*.partial.npz")):
            go.set()
    process = finish(process)
    assert process.returncode == 0, process.stderr
    assert held == [True]
    assert len(whole_results(bucket)) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tiny_bucket, tmp_path):
    """Decoded, the images of the larger set would take 240 MB more."""

    def peak(number):
        shutil.rmtree(tiny_bucket / SPLIT, ignore_errors=True)
        write_split(tiny_bucket / SPLIT, *blobs_and_masks(4, 512, 512, 2))
        for path in list((tiny_bucket / SPLIT).rglob("*.png")):
            for copy in range(1, number // 4):
                os.link(path, path.with_name(f"copy_{copy}_{path.name}"))
        config = {"dataset_config": {"target_size": [512, 512]}}
        (tiny_bucket / "datasets/dataset-tiny/config.yaml").write_text(yaml.safe_dump(config))
        program = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
        )
        command = [sys.executable, "-c", program, sys.executable, SCRIPT, *arguments("bucket", batch_size=1)]
        return float(subprocess.check_output(command, cwd=tmp_path, timeout=500))

    assert peak(348) < peak(48) + 100
