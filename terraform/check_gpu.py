"""Say in one line whether TensorFlow computes on every GPU of this machine, or why it does not.

Usage: python3 terraform/check_gpu.py
"""

import contextlib
import ctypes
import importlib.metadata
import os
import site
import subprocess
import sys
from pathlib import Path

# The oldest driver that runs every minor version of CUDA 12: NVIDIA's table "CUDA minor version compatibility".
OLDEST_DRIVER = "525.60.13"
# The oldest GPU that TensorFlow has kernels for: "cuda_compute_capabilities" of tf.sysconfig.get_build_info().
OLDEST_GPU = "6.0"
# cuDNN from 9.11 on has no kernels for GPUs older than Turing: NVIDIA's support matrices of 9.10 and 9.11.
LAST_CUDNN_BEFORE_TURING, TURING = "9.10", "7.5"
# The libraries that TensorFlow and cuDNN load; each stands after those that it needs.
LIBRARIES = (
    *("libcudart.so.12", "libnvJitLink.so.12", "libnvrtc.so.12", "libcublasLt.so.12", "libcublas.so.12"),
    *("libcufft.so.11", "libcusparse.so.12", "libcusolver.so.11", "libcudnn.so.9", "libnccl.so.2"),
)


def number(version):
    """A version as a tuple of integers, so that versions can be compared."""
    return tuple(int(part) for part in version.split("."))


def gpus_of_the_driver():
    """(name, compute capability, driver version) of each GPU, as the driver lists them."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        sys.exit("error: there is no NVIDIA driver on this machine: nvidia-smi is missing")
    output = " ".join((answer.stdout + answer.stderr).split())
    if "No devices were found" in output or not (output or answer.returncode):
        sys.exit(
            "error: no GPU: the driver is installed but finds none; either the machine has none, or the driver is too "
            "new for it (580 is the last branch for P100 and V100)"
        )
    if "version mismatch" in output:
        sys.exit(f"error: the GPU's driver was updated while it was running: stop the VM and start it again ({output})")
    if answer.returncode != 0:
        sys.exit(f"error: the GPU's driver does not work: nvidia-smi says: {output}")
    return [tuple(part.strip() for part in line.rsplit(",", 2)) for line in answer.stdout.splitlines() if line.strip()]


def refuse_what_cannot_work(gpus):
    """End with an error if the driver is too old, or if TensorFlow or cuDNN has no kernels for a GPU."""
    try:
        cudnn = importlib.metadata.version("nvidia-cudnn-cu12")
    except importlib.metadata.PackageNotFoundError:
        cudnn = None  # it may not come from pip
    for name, capability, driver in gpus:
        if number(driver) < number(OLDEST_DRIVER):
            sys.exit(f"error: the GPU's driver is too old: {driver}, TensorFlow's CUDA needs {OLDEST_DRIVER} or later")
        if number(capability) < number(OLDEST_GPU):
            sys.exit(
                f"error: TensorFlow has no kernels for {name}: its compute capability is {capability}, "
                f"{OLDEST_GPU} is the lowest that works"
            )
        old = number(capability) < number(TURING)
        if cudnn and old and number(cudnn)[:2] > number(LAST_CUDNN_BEFORE_TURING):
            sys.exit(
                f"error: cuDNN {cudnn} has no kernels for {name}, compute capability {capability}: "
                f"{LAST_CUDNN_BEFORE_TURING} is the last that has them; pip install -r requirements-gpu.txt"
            )


def libraries_that_do_not_load():
    """Yield (library, error) for each of LIBRARIES that cannot be loaded."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    for library in LIBRARIES:
        from_pip = [path for folder in folders for path in Path(folder).glob(f"nvidia/*/lib/{library}")]
        try:
            ctypes.CDLL(str(next(iter(from_pip), library)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            yield library, error


def fail(what):
    """End with an error, and with the missing libraries or the setting that may explain it."""
    if missing := list(libraries_that_do_not_load()):
        sys.exit(
            f"error: {what}: missing or damaged: {', '.join(library for library, _ in missing)} ({missing[0][1]}); "
            "pip install --force-reinstall -r requirements.txt -r requirements-gpu.txt"
        )
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        what += f"; CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}, which may hide GPUs"
    sys.exit(f"error: {what}; TF_CPP_MIN_LOG_LEVEL=0 before this command shows TensorFlow's own messages")


@contextlib.contextmanager
def quiet():
    """Hide the messages of TensorFlow's native code, unless TF_CPP_MIN_LOG_LEVEL asks for them."""
    screen = os.dup(2)
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)


def main():
    gpus = gpus_of_the_driver()
    refuse_what_cannot_work(gpus)
    with quiet():
        compute_on(len(gpus))


def compute_on(count, kind="GPU"):
    """Compute a convolution on each of so many devices of this kind; end with an error if one does not."""
    import tensorflow as tf

    try:
        seen = tf.config.list_logical_devices(kind)
    except (RuntimeError, tf.errors.OpError) as error:
        fail(f"TensorFlow cannot start on the {kind}: {str(error).splitlines()[0]}")
    if len(seen) != count:
        fail(f"TensorFlow sees {len(seen)} of {count} {kind}s")
    for device in seen:
        try:
            with tf.device(device.name):
                # This needs CUDA, cuDNN and kernels for this GPU; it is listed even without them.
                pixels = tf.nn.conv2d(tf.ones((1, 8, 8, 1)), tf.ones((3, 3, 1, 1)), strides=1, padding="VALID")
            total = float(tf.reduce_sum(pixels))
        except (RuntimeError, tf.errors.OpError) as error:
            fail(f"a convolution failed on {device.name}: {str(error).splitlines()[0]}")
        if not pixels.device.endswith(device.name) or total != 9 * 36:
            fail(f"a convolution meant for {device.name} ran on {pixels.device} and its sum is {total}, not {9 * 36}")
    print(f"TensorFlow {tf.__version__} computes on {len(seen)} of {count} {kind}s")


if __name__ == "__main__":
    main()
