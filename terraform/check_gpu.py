"""Fail unless TensorFlow can compute on every GPU of this machine. Usage: check_gpu.py <number of GPUs>"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings stay: they name the library that is missing

import tensorflow as tf  # noqa: E402


def main() -> None:
    expected = int(sys.argv[1])
    gpus = tf.config.list_logical_devices("GPU")
    if expected < 1 or len(gpus) != expected:
        sys.exit(f"error: TensorFlow sees {len(gpus)} of {expected} GPUs: see the warnings above")
    for gpu in gpus:
        with tf.device(gpu.name):
            # A convolution needs CUDA, cuDNN and kernels for this GPU; being listed needs none of them.
            pixels = tf.nn.conv2d(tf.ones((1, 8, 8, 1)), tf.ones((3, 3, 1, 1)), strides=1, padding="VALID")
        if not pixels.device.endswith(gpu.name) or float(tf.reduce_sum(pixels)) != 9 * 36:
            sys.exit(f"error: a convolution meant for {gpu.name} ran on {pixels.device} and gave {pixels.numpy()}")
    print(f"TensorFlow {tf.__version__} computes on {len(gpus)} of {expected} GPUs")


if __name__ == "__main__":
    main()
