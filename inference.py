"""The one inference pass: the network runs over the images, and only counts leave the device.

TensorFlow is imported only by the functions that run the network, because a rerun from cached counts works without it.
"""

import itertools
import math
import re

import numpy as np

from counts import BLOCK_STEP, BLOCK_THRESHOLDS, THRESHOLDS
from errors import ModelError, first_line

# Words in the errors, of various types, that TensorFlow, oneDNN, cuDNN and cuBLAS raise when no memory is left.
MEMORY_WORDS = re.compile("memory|alloc|exhausted|could not create a primitive|no algorithm worked|launch failed", re.I)

PEAK_FACTOR = 2  # a step takes up to twice the memory of the tensors that are in use at the same time (measured)


def _bins_of(probabilities, first_bin, density):
    """The bin of each probability, as `np.searchsorted(THRESHOLDS, p)`; len(THRESHOLDS) + 1 if p is not in [0, 1].

    The float32 numbers with the same first 20 bits form a cell. A cell contains no threshold, or it begins with one and
    contains 1, 2, 4, ... or 4,096 at equal distances. So the bin of the cell's first number and the number of
    thresholds in the cell give every bin exactly. Whole numbers are stored as float32, which is exact below 2**24,
    because TensorFlow keeps int32 numbers in the host's memory even if there is a GPU.
    """
    import tensorflow as tf

    bits = tf.bitcast(probabilities, tf.int32)
    cell = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 12), 2**20 - 1)
    place = tf.cast(tf.bitwise.bitwise_and(bits, 2**12 - 1), tf.float32)
    return tf.gather(first_bin, cell) + tf.math.ceil(place * tf.gather(density, cell))


def _cells():
    """For each cell, the bin of its first number and its thresholds per number: two float32 tensors, (2**20,)."""
    import tensorflow as tf

    one, minus_zero = np.float32([1, -0.0]).view(np.uint32) >> 12
    thresholds = np.bincount(THRESHOLDS.view(np.uint32) >> 12, minlength=2**20).astype(np.float32)
    first_bin = np.full(2**20, len(THRESHOLDS) + 1, np.float32)  # above 1, below 0, or NaN
    first_bin[: one + 1] = np.cumsum(thresholds[: one + 1]) - thresholds[: one + 1]  # those in the cells before
    first_bin[minus_zero] = 0
    thresholds[one] = 1  # so all numbers in this cell but 1 itself are beyond the last bin
    return tf.constant(first_bin), tf.constant(thresholds / 2**12)


def _counting_step(network, cells, height, width, num_classes):
    """Compile forward pass and histograms into one function, so that only counts leave the device.

    The function takes images, masks and a number: only so many images, the first ones, are counted. It returns the
    histogram, shape (classes, 2 * (bins + 1)), the coarse histogram of each image, shape (classes, images,
    2 * (coarse bins + 1)), and the probabilities of all images. In both histograms, the last bin of each truth value
    counts the values that are NaN or not in [0, 1].

    Raises
    ------
    ModelError
        The network cannot map images of this size to `num_classes` classes.
    """
    import tensorflow as tf

    # value * (1 / 255) in float64, rounded to float32, as in the training of the networks
    network_input = tf.constant((np.arange(256) * (1 / 255)).astype(np.float32))
    bins, block_bins = len(THRESHOLDS) + 2, len(BLOCK_THRESHOLDS) + 2

    def histograms(index, size):
        """A histogram of each row. A histogram of one vector needs scratch memory per thread or block of threads."""
        return tf.raw_ops.DenseBincount(
            input=tf.cast(index, tf.int32), size=size, weights=tf.constant([], tf.int32), binary_output=False
        )

    def step(images, masks, used):
        probabilities = network(tf.gather(network_input, tf.cast(images, tf.int32))[..., None], training=False)
        probabilities = tf.ensure_shape(tf.cast(probabilities, tf.float32), (None, height, width, num_classes))

        def count_class(i, whole, each):
            bin_ = tf.reshape(_bins_of(probabilities[:used, ..., i], *cells), (used, height * width))
            truth = tf.reshape(tf.cast(masks[:used, ..., i], tf.float32), (used, height * width))
            whole = whole.write(i, histograms(tf.reshape(truth * bins + bin_, (1, -1)), 2 * bins))
            each = each.write(i, histograms(truth * block_bins + tf.math.ceil(bin_ / BLOCK_STEP), 2 * block_bins))
            return i + 1, whole, each

        # Only 4 classes at a time, so that the memory does not grow with the number of classes.
        whole, each = (tf.TensorArray(tf.int32, num_classes) for _ in range(2))
        _, whole, each = tf.while_loop(
            lambda i, *_: i < num_classes, count_class, (0, whole, each), parallel_iterations=4
        )
        # int64, because a function must copy an int32 result to the host and so wait for it; int64 stays on the device.
        return tf.cast(whole.stack(), tf.int64), tf.cast(each.stack(), tf.int64), probabilities

    signature = [
        tf.TensorSpec((None, height, width), tf.uint8),
        tf.TensorSpec((None, height, width, num_classes), tf.uint8),
        tf.TensorSpec((), tf.int32),
    ]
    try:
        step = tf.function(step, input_signature=signature, autograph=False)
        step.get_concrete_function()
    except ValueError as error:
        raise ModelError(
            f"the network cannot map images of {width} x {height} pixels to {num_classes} classes: {first_line(error)}"
        ) from error
    return step


def _bytes_per_image(step):
    """Estimate the memory of a step, in bytes per image, from the tensors that are in use at the same time."""
    operations = step.get_concrete_function().graph.get_operations()
    last_use = {tensor.name: i for i, operation in enumerate(operations) for tensor in operation.inputs}
    no_longer_used, in_use, most = [0] * len(operations), 0, 0
    for i, operation in enumerate(operations):
        for tensor in operation.outputs:
            if tensor.shape.rank and tensor.shape[0] is None and tensor.shape[1:].is_fully_defined():
                size = tensor.shape[1:].num_elements() * tensor.dtype.size
                in_use += size
                no_longer_used[last_use.get(tensor.name, i)] += size
        most = max(most, in_use)
        in_use -= no_longer_used[i]
    return most


def _padded(part, size):
    """The images and masks of a part of a batch, filled up to `size` samples with copies of the last one.

    All steps have the same shape, because a convolution may add in another order for another number of images. So the
    probability of a pixel is the same to the last bit, however the images are divided into batches, devices and
    processes.
    """
    _, images, masks = zip(*(sample for sample, _ in part + [part[-1]] * (size - len(part))), strict=True)
    return np.stack(images), np.stack(masks)


def count_probabilities(
    network, samples, blocks, counts, class_names, batch_size, shown_names, on_smaller_batch, free_memory=math.inf
):
    """Run the network once over the samples, batch by batch, and add the counts to `counts`; a generator.

    Parameters
    ----------
    network : tf.keras.Model
        From `build_network`.
    samples : iterable of (name, image, masks)
        image uint8, shape (height, width), 0 to 255; masks uint8, shape (height, width, classes), 0 or 1.
    blocks : iterable of int
        The block of each sample, in the order of the samples.
    counts : counts.Counts
    class_names : list of str
        For messages.
    batch_size : int
        Images per replica and step. If a batch does not fit into memory, it is halved for the rest of the pass.
    shown_names : set of str
        The names of the images that `counts` keeps for the figure.
    on_smaller_batch : callable
        Is called with the batch size that did not fit and the new one.
    free_memory : float
        Bytes that a step may take. A larger batch is not tried: on a CPU, the process might be killed. Infinite for a
        GPU, which reports a lack of memory.

    Yields
    ------
    int
        Number of images that were just added to `counts`.

    Raises
    ------
    ModelError
        Probabilities are NaN or outside [0, 1], the network cannot take such images, or even a batch of one image does
        not fit into memory.
    """
    import tensorflow as tf

    height, width = counts.shown_images.shape[1:]
    cells = _cells()
    step = _counting_step(network, cells, height, width, len(class_names))
    strategy = network.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    distributed_step = tf.function(
        lambda *parts: strategy.run(step.python_function, parts), reduce_retracing=True, autograph=False
    )

    def does_not_fit(reason):
        sizes = ", ".join(map(str, did_not_fit))
        return ModelError(f"no batch of {sizes} images of {width} x {height} pixels fits into memory: {reason}")

    def start(batch):
        """Give each device its part of a batch. On a GPU this does not wait for the results."""
        parts = [batch[i : i + batch_size] for i in range(0, batch_size * replicas, batch_size)]
        # A replica without images gets one image, and its counts are ignored.
        arguments = [_padded(part or batch[:1], batch_size) + (np.int32(len(part) or 1),) for part in parts]
        if replicas == 1:
            return [(batch, step(*map(tf.constant, arguments[0])))]
        distributed = [
            strategy.experimental_distribute_values_from_function(
                lambda context, values=values: tf.constant(values[context.replica_id_in_sync_group])
            )
            for values in zip(*arguments, strict=True)
        ]
        results = map(strategy.experimental_local_results, distributed_step(*distributed))
        return list(zip(parts, zip(*results, strict=True), strict=True))

    def read(results):
        """Wait for the results: for each device its part, both histograms, and the images to show."""
        return [
            (
                part,
                whole.numpy().reshape(len(class_names), 2, -1),
                each.numpy().reshape(len(class_names), len(part), 2, -1).swapaxes(0, 1),
                [
                    (*sample, _bins_of(probabilities[j], *cells).numpy().astype(np.int32))
                    for j, (sample, _) in enumerate(part)
                    if sample[0] in shown_names
                ],
            )
            for part, (whole, each, probabilities) in results
            if part
        ]

    def add(part, whole, each, shown):
        for invalid in np.flatnonzero(whole[:, :, -1].any(axis=1)):
            raise ModelError(
                f"{class_names[invalid]} has probabilities that are NaN or outside [0, 1]: the network must end in "
                "sigmoid or softmax, and its weights must be finite"
            )
        labels = [block for _, block in part]
        counts.add([sample[0] for sample, _ in part], labels, whole[..., :-1], each[..., :-1], shown)

    out_of_memory = (
        *(getattr(tf.errors, f"{name}Error") for name in ("ResourceExhausted", "Aborted", "NotFound", "Internal")),
        tf.errors.UnknownError,
        MemoryError,
    )
    samples, started, did_not_fit = zip(samples, blocks, strict=True), [], []
    needed = _bytes_per_image(step) * replicas
    fitting = batch_size
    while fitting > 1 and PEAK_FACTOR * needed * fitting > free_memory:
        fitting //= 2
    if needed * fitting > free_memory:
        did_not_fit.append(batch_size)
        raise does_not_fit(
            f"one image needs some {needed / 1e6:,.0f} MB, {free_memory / 1e6:,.0f} MB are free; end other programs, "
            "raise the limit (ulimit -v, or the container's), or use a machine with more memory"
        )
    if fitting < batch_size:
        did_not_fit.append(batch_size)
        on_smaller_batch(batch_size, fitting)
        batch_size = fitting
    while True:
        batch = list(itertools.islice(samples, batch_size * replicas))
        try:
            following = start(batch) if batch else []
            # the previous batch, so that the devices work on this one while the host adds the previous counts
            finished = read(started)
        except out_of_memory as error:  # a GPU may report it only when the results are read
            did_not_fit.append(batch_size)
            if batch_size == 1:
                # TensorFlow puts lines of a traceback before the line with the reason.
                lines = [line.strip() for line in str(error).splitlines()]
                reasons = [line for line in lines if MEMORY_WORDS.search(line) and not line.startswith("File ")]
                if not reasons and not isinstance(error, MemoryError):
                    raise
                raise does_not_fit(first_line(reasons[0] if reasons else error)) from error
            samples = itertools.chain(*(part for part, _ in started), batch, samples)  # neither has been added
            started = following = []  # frees their memory
            batch_size //= 2
            on_smaller_batch(did_not_fit[-1], batch_size)
            continue
        for results in finished:
            add(*results)
        if finished:
            yield sum(len(part) for part, *_ in finished)
        if not batch:
            return
        started = following
