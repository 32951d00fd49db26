"""The one inference pass: the network runs over the images, and only counts leave the device.

TensorFlow is imported only by the functions that run the network, because a rerun from kept counts works without it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

import network
from counts import BLOCK_STEP, BLOCK_THRESHOLDS, HALF, THRESHOLDS, Counts, ShownSlice, slices_to_show
from errors import ModelError, first_line


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


def _histograms(index, size):
    """A histogram of each row. One of a single long vector would need scratch memory for each block of threads."""
    import tensorflow as tf

    return tf.raw_ops.DenseBincount(
        input=tf.cast(index, tf.int32), size=size, weights=tf.constant([], tf.int32), binary_output=False
    )


def _counting_step(model, cells, height, width, classes):
    """Compile forward pass and counting into one function, so that only counts leave the device.

    The function takes images, masks and a number: only so many images, the first ones, are counted. It returns the
    histogram, shape (classes, 2 * bins), the coarse histogram of each image, shape (classes, images, 2 * coarse bins),
    the overlap of channels and masks, shape (classes, classes), and the probabilities of all images. The last bin of
    each truth value is one more than `counts.Counts` has: it counts the values that are NaN or not in [0, 1].

    Raises
    ------
    ModelError
        The network cannot map images of this size to `classes` classes.
    """
    import tensorflow as tf

    # value * (1 / 255) in float64, rounded to float32, as in the training of the networks
    network_input = tf.constant((np.arange(256) * (1 / 255)).astype(np.float32))
    bins, coarse_bins = len(THRESHOLDS) + 2, len(BLOCK_THRESHOLDS) + 2

    def step(images, masks, used):
        probabilities = model(tf.gather(network_input, tf.cast(images, tf.int32))[..., None], training=False)
        probabilities = tf.ensure_shape(tf.cast(probabilities, tf.float32), (None, height, width, classes))
        # By rows of pixels: sums of 0 and 1 over a row are exact in float32.
        truth_of_rows = tf.reshape(tf.cast(masks[:used], tf.float32), (used * height, width, classes))

        def count_class(i, histogram, of_images, overlap):
            bin_ = tf.reshape(_bins_of(probabilities[:used, ..., i], *cells), (used, height * width))
            truth = tf.reshape(truth_of_rows[..., i], (used, height * width))
            histogram = histogram.write(i, _histograms(tf.reshape(truth * bins + bin_, (1, -1)), 2 * bins))
            coarse = truth * coarse_bins + tf.math.ceil(bin_ / BLOCK_STEP)
            of_images = of_images.write(i, _histograms(coarse, 2 * coarse_bins))
            predicted = tf.reshape(tf.cast(bin_ > HALF, tf.float32), (used * height, 1, width))
            inside = tf.reduce_sum(tf.cast(predicted @ truth_of_rows, tf.int64), axis=(0, 1))
            return i + 1, histogram, of_images, overlap.write(i, inside)

        # Only 4 classes at a time, so that the memory does not grow with the number of classes.
        arrays = [tf.TensorArray(dtype, classes) for dtype in (tf.int32, tf.int32, tf.int64)]
        _, *arrays = tf.while_loop(lambda i, *_: i < classes, count_class, (0, *arrays), parallel_iterations=4)
        # int64, because a function must copy an int32 result to the host and so wait for it; int64 stays on the device.
        return *(tf.cast(array.stack(), tf.int64) for array in arrays), probabilities

    signature = [
        tf.TensorSpec((None, height, width), tf.uint8),
        tf.TensorSpec((None, height, width, classes), tf.uint8),
        tf.TensorSpec((), tf.int32),
    ]
    step = tf.function(step, input_signature=signature, autograph=False)
    try:
        step.get_concrete_function()
    except ValueError as error:
        raise ModelError(
            f"the network cannot map images of {width} x {height} pixels to {classes} classes: {first_line(error)}"
        ) from error
    return step


def _padded(part, size):
    """The images and masks of a part of a batch, filled up to `size` samples with copies of the last one.

    All steps have the same shape, because a convolution may add in another order for another number of images. So, on
    one kind of device, the probability of a pixel is the same to the last bit in whichever batch its image is.
    """
    images, masks = zip(*((image, masks) for _, image, masks, _ in part + [part[-1]] * (size - len(part))), strict=True)
    return np.stack(images), np.stack(masks)


def _worth_showing(samples, shown):
    """The slices of a batch that are better to show than those in `shown`; their bins are not known yet."""
    new = [
        ShownSlice(k, name, block, pixels, image, masks, None)
        for name, image, masks, block in samples
        for k, pixels in enumerate(masks.sum(axis=0, dtype=np.uint16).sum(axis=0).tolist())
    ]
    chosen = slices_to_show(shown + new, samples[0][2].shape[-1])
    return [one._replace(truth=one.truth.astype(bool)) for one in chosen if one.image is not None and one.bins is None]


class RunningBatch(NamedTuple):
    """A batch that the devices work on, or that waits for them."""

    samples: list
    batch_size: int  # per replica
    counts: Counts  # to which its counts are to be added
    future: Future  # of `Counter._run`


class Counter:
    """Runs a network over images and counts.

    Two threads may use it: one starts the batches of a chunk while the other adds the last one of the chunk before.

    Parameters
    ----------
    model : tf.keras.Model
        From `network.build_network`.
    target_size : (width, height), in pixels
    class_names : list of str
        For messages.
    batch_size : int
        Images per replica and step. If a batch does not fit into memory, it is halved for the rest of the Counter's
        life.
    warn : callable
        Is called with a sentence when a batch is halved.

    Attributes
    ----------
    batch_size : int

    Raises
    ------
    ModelError
        The network cannot take such images, or gives other classes.
    """

    def __init__(self, model, target_size, class_names, batch_size, warn):
        import tensorflow as tf

        width, height = target_size
        self.batch_size, self._class_names, self._warn = batch_size, class_names, warn
        self._strategy = model.distribute_strategy
        self._replicas = self._strategy.num_replicas_in_sync
        self._cells = _cells()
        self._step = _counting_step(model, self._cells, height, width, len(class_names))
        self._distributed_step = tf.function(
            lambda *parts: self._strategy.run(self._step.python_function, parts), reduce_retracing=True, autograph=False
        )
        self._facts = network.device_facts()
        # Two, so that a GPU gets the next images while the results before are fetched. CPUs are busy with one.
        self._threads = ThreadPoolExecutor(2 if self._facts["gpu"] else 1)

    @property
    def images_per_step(self):
        """The number of images that `start` takes at once."""
        return self.batch_size * self._replicas

    def start(self, samples, counts):
        """Give the devices a batch, without waiting for them.

        Parameters
        ----------
        samples : list of (name, image, masks, block), at most `images_per_step`
            image uint8, shape (height, width), 0 to 255; masks uint8, shape (height, width, classes), 0 or 1; block
            the label of the image's block.
        counts : counts.Counts

        Returns
        -------
        RunningBatch
            For `add`. Start the next batch before, so that the devices need not wait while the host adds this one.
        """
        size = max(self.batch_size, -(-len(samples) // self._replicas))  # another thread may have just halved it
        parts = [samples[i : i + size] for i in range(0, size * self._replicas, size)]
        # A replica without images gets one image, and its counts are ignored.
        arguments = [_padded(part or samples[:1], size) + (np.int32(len(part) or 1),) for part in parts]
        future = self._threads.submit(self._run, parts, arguments, _worth_showing(samples, counts.shown))
        return RunningBatch(samples, size, counts, future)

    def add(self, batch):
        """Wait for a batch that was started, and add its counts.

        Raises
        ------
        ModelError
            Probabilities are NaN or outside [0, 1], or even a batch of one image does not fit into memory.
        """
        samples, size, counts, future = batch
        try:
            results = future.result()
        except Exception as error:
            self._halve_batch(error, size)
            step = self.images_per_step
            for first in range(0, len(samples), step):
                self.add(self.start(samples[first : first + step], counts))
            return
        for result in results:
            counts.add(self._counts(size, *result))

    def _run(self, parts, arguments, worth_showing):
        """Run the network on a batch, and fetch the results, in a thread of its own.

        Copying the images to a GPU waits until the GPU has done the batch before. That is well so: TensorFlow copies
        results to the host only when the GPU has done all that it was given until then.

        Returns the arguments of `_counts` for each device with images, without the size.
        """
        import tensorflow as tf

        if self._replicas == 1:
            tensors = [self._step(*map(tf.constant, arguments[0]))]
        else:
            distributed = [
                self._strategy.experimental_distribute_values_from_function(
                    lambda context, values=values: tf.constant(values[context.replica_id_in_sync_group])
                )
                for values in zip(*arguments, strict=True)
            ]
            results = map(self._strategy.experimental_local_results, self._distributed_step(*distributed))
            tensors = zip(*results, strict=True)
        results = []
        for part, (*counted, probabilities) in zip(parts, tensors, strict=True):
            shown = []
            for j, (name, *_) in enumerate(part):
                if chosen := [one for one in worth_showing if one.name == name]:
                    bins = _bins_of(probabilities[j], *self._cells).numpy().astype(np.int32)
                    shown += [one._replace(bins=bins) for one in chosen]
            if part:
                results.append((part, *(tensor.numpy() for tensor in counted), shown))
        return results

    def _halve_batch(self, error, tried):
        """Halve the batch size that was tried; raises ModelError, or the error itself, where that does not help."""
        if not network.is_out_of_memory(error):
            raise error
        if tried == 1:
            reason = next(filter(network.is_out_of_memory, str(error).splitlines()), first_line(error))
            raise ModelError(
                f"a batch of one image does not fit into memory ({reason.strip()[:300]}): end other programs, or use a "
                "machine with more memory"
            ) from error
        if tried > self.batch_size:  # the batch before did not fit either
            return
        self.batch_size = tried // 2
        self._warn(
            f"a batch of {tried} images does not fit into memory: continuing with {self.batch_size}; next time use "
            f"--batch-size {self.batch_size}"
        )

    def _counts(self, size, part, histogram, of_images, overlap, shown):
        """The Counts of one device's part of a batch."""
        classes = len(self._class_names)
        histogram = histogram.reshape(classes, 2, -1)
        invalid = np.flatnonzero(histogram[:, :, -1].any(axis=1))
        if len(invalid):
            raise ModelError(
                f"{self._class_names[invalid[0]]} has probabilities that are NaN or outside [0, 1]: the network must "
                "end in sigmoid or softmax, and its weights must be finite"
            )
        return Counts(
            histogram=histogram[..., :-1],
            block_histograms=of_images.reshape(classes, len(part), 2, -1).swapaxes(0, 1)[..., :-1],
            block_labels=np.array([block for *_, block in part]),
            overlap=overlap,
            images=len(part),
            shown=shown,
            counted_with=[{"images": len(part), "batch_size": size, **self._facts}],
        )
