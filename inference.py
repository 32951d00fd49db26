"""The one inference pass: the network runs over the images, and only counts leave the device.

TensorFlow is imported only by the functions that run the network: a rerun from cached counts does without it.
"""

import itertools
import re

import numpy as np

from counts import BLOCK_STEP, BLOCK_THRESHOLDS, THRESHOLDS
from errors import ModelError, first_line

# What TensorFlow, oneDNN, cuDNN and cuBLAS say when there is no memory left, under various types of error.
MEMORY_WORDS = re.compile("memory|alloc|exhausted|could not create a primitive|no algorithm worked|launch failed", re.I)


def _bins_of(probabilities):
    """The bin of each probability, as `np.searchsorted(THRESHOLDS, p)`; len(THRESHOLDS) + 1 where it is none.

    The float32 numbers with the same first 20 bits are a cell. Each cell either has no threshold in it, or begins with
    one, and has 1, 2, 4, ... or 4,096 at equal distances: so its first bin and their number give every bin exactly.
    TensorFlow keeps int32 arithmetic in the host's memory, even on a GPU, so whole numbers are held as float32 (all are
    below 2**24).
    """
    import tensorflow as tf

    bits = tf.bitcast(probabilities, tf.int32)
    cell = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 12), 2**20 - 1)
    place = tf.cast(tf.bitwise.bitwise_and(bits, 2**12 - 1), tf.float32)
    first_bin, thresholds = _cells()
    return tf.gather(first_bin, cell) + tf.math.ceil(place * tf.gather(thresholds / 2**12, cell))


def _cells():
    """Bin of the first float32 number of every cell, and number of thresholds in it: two float32 arrays (2**20,)."""
    first_bin = np.full(2**20, len(THRESHOLDS) + 1, np.float32)  # above 1, below 0, or NaN
    thresholds = np.zeros(2**20, np.float32)
    one, minus_zero = np.float32([1, -0.0]).view(np.uint32) >> 12
    starts = (np.arange(one + 1, dtype=np.int32) << 12).view(np.float32)
    first_bin[: one + 1] = np.searchsorted(THRESHOLDS, starts)
    thresholds[:one] = np.diff(first_bin[: one + 1])
    thresholds[one] = 1  # all but 1 itself are beyond the last bin
    first_bin[minus_zero] = 0
    return first_bin, thresholds


def _counting_step(network, height, width, num_classes):
    """Compile forward pass and histograms into one function, so that only counts leave the device.

    It takes images, masks and the number of images to count, the first ones, and returns the histogram, shape
    (classes, 2 * (bins + 1)), that of each image in blocks' bins, shape (classes, images, 2 * (coarse bins + 1)), and
    the probabilities. In both the last bin of a truth value counts what is no probability.
    """
    import tensorflow as tf

    # value * (1 / 255) in float64, rounded to float32: what the networks saw in training
    network_input = tf.constant((np.arange(256) * (1 / 255)).astype(np.float32))
    bins, block_bins = len(THRESHOLDS) + 2, len(BLOCK_THRESHOLDS) + 2

    def histograms(index, size):
        """A histogram of each row. That of a vector would need scratch memory for every thread, or block of them."""
        return tf.raw_ops.DenseBincount(
            input=tf.cast(index, tf.int32), size=size, weights=tf.constant([], tf.int32), binary_output=False
        )

    def step(images, masks, used):
        probabilities = network(tf.gather(network_input, tf.cast(images, tf.int32))[..., None], training=False)
        probabilities = tf.ensure_shape(tf.cast(probabilities, tf.float32), (None, height, width, num_classes))

        def count_class(i, whole, each):
            bin_ = tf.reshape(_bins_of(probabilities[:used, ..., i]), (used, height * width))
            truth = tf.reshape(tf.cast(masks[:used, ..., i], tf.float32), (used, height * width))
            whole = whole.write(i, histograms(tf.reshape(truth * bins + bin_, (1, -1)), 2 * bins))
            each = each.write(i, histograms(truth * block_bins + tf.math.ceil(bin_ / BLOCK_STEP), 2 * block_bins))
            return i + 1, whole, each

        # A few classes at a time: all at once would take memory for their number.
        whole, each = (tf.TensorArray(tf.int32, num_classes) for _ in range(2))
        _, whole, each = tf.while_loop(
            lambda i, *_: i < num_classes, count_class, (0, whole, each), parallel_iterations=4
        )
        # An int32 result of a function waits in the host's memory, one of int64 is left on the device.
        return tf.cast(whole.stack(), tf.int64), tf.cast(each.stack(), tf.int64), probabilities

    signature = [
        tf.TensorSpec((None, height, width), tf.uint8),
        tf.TensorSpec((None, height, width, num_classes), tf.uint8),
        tf.TensorSpec((), tf.int32),
    ]
    try:
        step = tf.function(step, input_signature=signature)
        step.get_concrete_function()
    except ValueError as error:
        raise ModelError(
            f"the network cannot map images of {width} x {height} pixels to {num_classes} classes: {first_line(error)}"
        ) from error
    return step


def _padded(part, size):
    """Images and masks of a part of a batch, its last sample repeated up to `size`.

    Steps of one shape give a pixel the same probability, to the last bit, however the images are divided into
    batches, devices and processes: a convolution may sum in another order for another number of images.
    """
    _, images, masks = zip(*(sample for sample, _ in part + [part[-1]] * (size - len(part))), strict=True)
    return np.stack(images), np.stack(masks)


def count_probabilities(network, samples, blocks, counts, class_names, batch_size, shown_names, on_smaller_batch):
    """Run the network once over the samples and add what it gives to `counts`: a generator, batch by batch.

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
        Images per replica and step. When a batch does not fit into memory the size is halved for the rest of the pass.
    shown_names : set of str
        The images to keep for display.
    on_smaller_batch : callable taking the batch size that did not fit and the new one

    Yields
    ------
    int
        Number of images that `counts` just gained.

    Raises
    ------
    ModelError
        Probabilities that are NaN or outside [0, 1], a network that cannot take such images, or one image alone not
        fitting into memory.
    """
    import tensorflow as tf

    height, width = counts.shown_images.shape[1:]
    step = _counting_step(network, height, width, len(class_names))
    bins_of = tf.function(_bins_of, input_signature=[tf.TensorSpec((height, width, len(class_names)))])
    strategy = network.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    distributed_step = tf.function(lambda *parts: strategy.run(step.python_function, parts), reduce_retracing=True)

    def start(batch):
        """Hand a batch to the devices, a part to each; on a GPU this does not wait for the results."""
        parts = [batch[i : i + batch_size] for i in range(0, batch_size * replicas, batch_size)]
        # A replica without images gets one, whose counts are dropped.
        arguments = [_padded(part or batch[:1], batch_size) + (np.int32(len(part) or 1),) for part in parts]
        if replicas == 1:
            return [(batch, step(*arguments[0]))]
        distributed = [
            strategy.experimental_distribute_values_from_function(
                lambda context, values=values: tf.constant(values[context.replica_id_in_sync_group])
            )
            for values in zip(*arguments, strict=True)
        ]
        results = map(strategy.experimental_local_results, distributed_step(*distributed))
        return list(zip(parts, zip(*results, strict=True), strict=True))

    def read(results):
        """Wait for what the devices give: part, both histograms, and what is to be shown."""
        return [
            (
                part,
                whole.numpy().reshape(len(class_names), 2, -1),
                each.numpy().reshape(len(class_names), len(part), 2, -1).swapaxes(0, 1),
                [
                    (*sample, bins_of(probabilities[j]).numpy().astype(np.int32))
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
    while True:
        batch = list(itertools.islice(samples, batch_size * replicas))
        try:
            following = start(batch) if batch else []
            # one batch behind, so that the device has its next batch while the host counts this one
            finished = read(started)
        except out_of_memory as error:  # a GPU may report it only where its results are read
            did_not_fit.append(batch_size)
            if batch_size == 1:
                # TensorFlow puts the lines of a traceback before the one that counts.
                lines = [line.strip() for line in str(error).splitlines()]
                reasons = [line for line in lines if MEMORY_WORDS.search(line) and not line.startswith("File ")]
                if not reasons and not isinstance(error, MemoryError):
                    raise
                raise ModelError(
                    f"no batch of {', '.join(map(str, did_not_fit))} images of {width} x {height} pixels fits into "
                    f"memory: {first_line(reasons[0] if reasons else error)}"
                ) from error
            samples = itertools.chain(*(part for part, _ in started), batch, samples)  # neither was added yet
            started = following = []  # gives their memory back
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
