"""What must not get slow or large: reruns, overlapping of network and inference, memory. Ratios are in benchmark.py."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark import multiply, peak_megabytes, seconds
from chaos_proxy import ChaosProxy
from helpers import SCRIPT, arguments, blobs_and_masks, run_tool, write_split
from fake_gcs import fake_gcs_server
from test_run import SPLIT, upload

from gcp_utils import open_bucket


def test_a_rerun_takes_a_second_and_a_half_at_most(sandbox, tmp_path):
    model, dataset = "segmentation-model-composite_0123_20200321T154533Z", "dataset-composite_0123/validation"
    bucket = Path(shutil.copytree(sandbox, tmp_path / "sandbox"))
    assert run_tool(*arguments(bucket, dataset, model), cwd=tmp_path).returncode == 0
    rerun = [SCRIPT, *arguments(bucket, dataset, model, optimizing_class_metric="f1_score")]
    assert min(seconds(*rerun, cwd=tmp_path) for _ in range(5)) <= 1.5


def test_fetching_overlaps_inference(tiny_bucket, tmp_path, monkeypatch):
    shutil.rmtree(tiny_bucket / SPLIT)
    write_split(tiny_bucket / SPLIT, *blobs_and_masks(400, 64, 96, 2))
    local = seconds(SCRIPT, *arguments(tiny_bucket, batch_size=2), cwd=tmp_path)
    with fake_gcs_server() as server, ChaosProxy(server) as proxy:
        upload(server, tiny_bucket, "bkt")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        # every answer waits, so that fetching takes about as long as all the rest
        proxy.latency = local * 32 / (3 * 400)
        start = time.perf_counter()
        bucket = open_bucket("gs://bkt", tmp_path / "cache")
        blobs = bucket.list(SPLIT)
        with ThreadPoolExecutor(bucket.threads) as pool:
            list(pool.map(bucket.fetch, blobs))
        fetching = time.perf_counter() - start
        assert fetching > 0.8 * local
        whole = seconds(SCRIPT, *arguments("gs://bkt", batch_size=2), cwd=tmp_path)
    assert whole < 0.8 * (fetching + local)


def test_memory_does_not_grow_with_the_number_of_images(tiny_bucket, tmp_path):
    shutil.rmtree(tiny_bucket / SPLIT)
    write_split(tiny_bucket / SPLIT, *blobs_and_masks(50, 64, 96, 2))
    multiply(tmp_path / "large", tiny_bucket, 20, SPLIT)
    once, twenty_times = (
        peak_megabytes(SCRIPT, *arguments(bucket), cwd=tmp_path) for bucket in (tiny_bucket, tmp_path / "large")
    )
    assert twenty_times < 1.1 * once


def test_nothing_heavy_is_imported_for_help(tmp_path):
    program = f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    program += (
        f"import runpy\ntry: runpy.run_path({str(SCRIPT)!r})\nfinally: print(sorted(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    loaded = process.stderr
    for heavy in ("tensorflow", "matplotlib", "scipy", "google.cloud", "h5py", "pandas"):
        assert f"'{heavy}'" not in loaded
    assert "'numpy'" in loaded
    assert os.listdir(tmp_path) == []
