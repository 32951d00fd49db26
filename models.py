"""The science: the class metrics, the one inference pass, and the training of thresholds.

TensorFlow is imported only by the functions that run the network: a rerun from cached counts does without it.
"""

import itertools
import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from counts import BLOCK_STEP, BLOCK_THRESHOLDS, THRESHOLDS, confusion
from errors import ModelError, NotConvergedError, first_line

# How thresholds are trained; these go to scipy.optimize.minimize_scalar and into the result. Should a class not
# converge, raise maxiter or the tolerance.
OPT_BOUNDS = [0.0, 1.0]  # the thresholds to choose from, within [0, 1]
OPT_METHOD = "bounded"  # the method of minimize_scalar that keeps to bounds
OPT_TOL = 1e-4  # on the threshold; the grid of thresholds is 1.5e-5 wide
OPT_OPTIONS = {"maxiter": 500}

CONFIDENCE = 0.95  # of the bootstrap intervals


def ratio(numerator, denominator):
    """numerator / denominator with 0 / 0 = 0: float64 for arrays, exact for Python integers."""
    if isinstance(denominator, np.ndarray):
        return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)
    return Fraction(numerator, denominator) if denominator else Fraction(0)


def matthews_corrcoef(tp, fp, fn, tn):
    """Correlation of mask and prediction (Matthews, 1975), in [-1, 1]; 0 where either is constant."""
    if isinstance(tp, np.ndarray):
        tp, fp, fn, tn = (count.astype(np.float64) for count in (tp, fp, fn, tn))
        return ratio(tp * tn - fp * fn, np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn))
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) or 1)


# Every metric is a function of the four counts, larger is better; to add one, add a line.
CLASS_METRICS = {
    "iou_score": lambda tp, fp, fn, tn: ratio(tp, tp + fp + fn),
    "f1_score": lambda tp, fp, fn, tn: ratio(2 * tp, 2 * tp + fp + fn),
    "f2_score": lambda tp, fp, fn, tn: ratio(5 * tp, 5 * tp + fp + 4 * fn),
    "precision": lambda tp, fp, fn, tn: ratio(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: ratio(tp, tp + fn),
    "binary_accuracy_tfkeras": lambda tp, fp, fn, tn: ratio(tp + tn, tp + fp + fn + tn),
    "binary_accuracy_sm": lambda tp, fp, fn, tn: ratio(tp + tn, tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn: (ratio(tp, tp + fn) + ratio(tn, tn + fp)) / 2,
    "matthews_corrcoef": matthews_corrcoef,
}


# ---------------------------------------------------------------------------------------------------------------
# The one inference pass


# What TensorFlow, oneDNN, cuDNN and cuBLAS say when there is no memory left, under various types of error.
MEMORY_WORDS = re.compile("memory|alloc|exhausted|could not create a primitive|no algorithm worked|launch failed", re.I)


def _bins_of(probabilities):
    """The bin of each probability, as `np.searchsorted(THRESHOLDS, p)`; len(THRESHOLDS) + 1 where it is none.

    Every step is exact: the bits of a float32, products with powers of two, and `1 - p` for p >= 1/2. TensorFlow keeps
    int32 arithmetic in the host's memory, even on a GPU, so whole numbers are held as float32 (all are below 2**24).
    """
    import tensorflow as tf

    p, last = probabilities, len(THRESHOLDS)
    tail = tf.where(p > 0.5, 1 - p, p)
    number = tf.bitwise.right_shift(tf.bitcast(tail, tf.int32), 13)  # 1,024 an octave
    start = tf.bitcast(tf.bitwise.left_shift(number, 13), tf.float32)
    number = tf.cast(number, tf.float32) - float(THRESHOLDS[:1].view(np.int32)[0] >> 13)
    low = tf.maximum(number + tf.cast(p > start, tf.float32), 0)
    middle = tf.math.ceil(p * 65536) + float(np.searchsorted(THRESHOLDS, 1 / 64) - 1024)
    # Thresholds from p on: every multiple of 2**-24 up to 2**-14, and 1,024 an octave from there on.
    high = last - tf.where(tail < 2**-14, tail * 2**24, number - (40 - 14 - 1) * 1024)
    bins = tf.where(p <= 1 / 64, low, tf.where(p <= 63 / 64, middle, high))
    return tf.where((p >= 0) & (p <= 1), bins, last + 1.0)  # false for NaN


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


# ---------------------------------------------------------------------------------------------------------------
# Thresholds


@dataclass
class TrainedThreshold:
    """What training gives for one class. All thresholds lie on the grid k / GRID unless said otherwise."""

    x: float  # the trained threshold
    metric: float  # the class metric at x: the best there is within the bounds
    metric_at_half: float
    x_interval: tuple  # 95 % bootstrap interval of x; not on the grid
    metric_interval: tuple  # 95 % bootstrap interval of the metric at x
    best_stretch: tuple  # lowest and highest threshold of the stretch around x that is equally good
    plain: tuple  # threshold and metric that minimize_scalar finds alone, over the whole bounds
    success: bool
    status: int
    message: str
    nfev: int
    history: list  # (threshold, metric) of every evaluation
    warnings: list  # sentences


@dataclass
class ClassCurves:
    """Metric, precision and recall of one class over thresholds, with the bootstrap band of the metric."""

    thresholds: np.ndarray  # (GRID + 1,) float64, k / GRID
    metric: np.ndarray  # (GRID + 1,) float64
    precision: np.ndarray
    recall: np.ndarray
    band_thresholds: np.ndarray  # (len(COARSE_EDGES),)
    band_low: np.ndarray
    band_high: np.ndarray
    positive_pixels: int


def check_trainable(counts, class_names):
    """Raise ModelError for a class without a positive or without a negative pixel."""
    for name, (negative, positive) in zip(class_names, counts.histogram.sum(axis=-1), strict=True):
        if not positive:
            raise ModelError(
                f"{name} cannot be trained: no pixel of its masks is positive in the {counts.images} images used"
            )
        if not negative:
            raise ModelError(
                f"{name} cannot be trained: every pixel of its masks is positive in the {counts.images} images used"
            )


def train_prediction_threshold(counts, class_index, class_name, metric_name, on_evaluation):
    """Train the threshold of one class with `scipy.optimize.minimize_scalar` on 1 - metric.

    Parameters
    ----------
    counts : counts.Counts
    class_index : int
    class_name : str
        For messages.
    metric_name : str
        A key of CLASS_METRICS.
    on_evaluation : callable taking (number of the evaluation, threshold, metric)

    Returns
    -------
    TrainedThreshold, ClassCurves

    Raises
    ------
    NotConvergedError
    """
    class_metric = CLASS_METRICS[metric_name]
    tp, fp, fn, tn = confusion(counts.histogram[class_index])
    metric = class_metric(tp, fp, fn, tn)
    low, high = math.ceil(OPT_BOUNDS[0] * GRID), math.floor(OPT_BOUNDS[1] * GRID)
    first, last = global_optimum(class_metric, tp, fp, fn, tn, low, high)
    middle = (first + last) // 2

    history = []

    def objective(threshold):
        k = round(threshold * GRID)
        history.append((k / GRID, float(metric[k])))
        on_evaluation(len(history) - 1, *history[-1])
        return 1 - metric[k]

    # A bounded search can settle on any local optimum, or on a flat shoulder of the best one. Since the metric is known
    # at every threshold, a search that got stuck starts again in the basin of the global optimum, and the last
    # evaluation is the middle of the widest best stretch, which is what is reported: no threshold is better.
    result = plain = _minimize(objective, class_name, low, high)
    plain_position = round(plain.x * GRID)
    if metric[plain_position] < metric[middle]:
        result = _minimize(objective, class_name, *basin(metric, first, last, low, high))
    objective(middle / GRID)

    x_interval, metric_interval, band = bootstrap_intervals(counts.replicates[:, class_index], class_metric, middle)
    trained = TrainedThreshold(
        x=middle / GRID,
        metric=float(metric[middle]),
        metric_at_half=float(metric[GRID // 2]),
        x_interval=x_interval,
        metric_interval=metric_interval,
        best_stretch=(first / GRID, last / GRID),
        plain=(plain_position / GRID, float(metric[plain_position])),
        success=bool(result.success),
        status=int(result.status),
        message=result.message.strip(),
        nfev=len(history),
        history=history,
        warnings=_degenerate(class_name, metric_name, metric, tp, fp, fn, low, middle, high),
    )
    curves = ClassCurves(
        thresholds=np.arange(GRID + 1) / GRID,
        metric=metric,
        precision=CLASS_METRICS["precision"](tp, fp, fn, tn),
        recall=CLASS_METRICS["recall"](tp, fp, fn, tn),
        band_thresholds=COARSE_EDGES / GRID,
        band_low=band[0],
        band_high=band[1],
        positive_pixels=int(tp[0] + fn[0]),
    )
    return trained, curves


def _minimize(objective, class_name, low, high):
    from scipy.optimize import minimize_scalar  # here, so that the first run can import it while the network runs

    result = minimize_scalar(
        objective,
        bounds=(low / GRID, high / GRID),
        method=OPT_METHOD,
        options={**OPT_OPTIONS, "xatol": OPT_TOL},
    )
    if not result.success:
        raise NotConvergedError(
            f"{class_name}: minimize_scalar did not converge ({result.message.strip()}); raise maxiter in OPT_OPTIONS "
            "or OPT_TOL at the top of models.py and run again"
        )
    return result


def _widest_run(chosen, positions):
    """First and last position of the widest run of true values; the first of equally wide ones.

    Parameters
    ----------
    chosen : bool array, shape (n,), at least one true
    positions : increasing array, shape (n,)
    """
    change = np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]]))
    first, last = positions[np.flatnonzero(change == 1)], positions[np.flatnonzero(change == -1) - 1]
    widest = np.argmax(last - first)
    return first[widest], last[widest]


def global_optimum(class_metric, tp, fp, fn, tn, low, high):
    """The widest stretch of best thresholds k / GRID with low <= k <= high.

    Rounding can make unequal metrics equal, and other ones for IoU than for F1, whose optima are the same. So the
    best few are compared again in exact arithmetic.

    Parameters
    ----------
    class_metric : callable, a value of CLASS_METRICS
    tp, fp, fn, tn : int64 arrays, shape (GRID + 1,)
    low, high : int

    Returns
    -------
    first, last : int
    """
    positions = np.arange(low, high + 1)
    window = np.stack([tp, fp, fn, tn])[:, low : high + 1]
    metric = class_metric(*window)
    near = np.flatnonzero(metric >= metric.max() - 1e-14)
    distinct, which = np.unique(window[:, near], axis=1, return_inverse=True)
    exact = [class_metric(*counts) for counts in distinct.T.tolist()]
    best = max(exact)
    chosen = np.zeros(len(positions), bool)
    chosen[near] = np.array([value == best for value in exact])[which.ravel()]
    first, last = _widest_run(chosen, positions)
    return int(first), int(last)


def basin(metric, first, last, low, high):
    """The interval around a best stretch in which the metric never falls on the way to it.

    Parameters
    ----------
    metric : float64 array, shape (GRID + 1,)
    first, last, low, high : int
        The stretch and the bounds, as positions on the grid.

    Returns
    -------
    left, right : int
        At least one step wide, within the bounds.
    """
    step = np.diff(metric)
    falls = np.flatnonzero(step[low:first] < 0)
    rises = np.flatnonzero(step[last:high] > 0)
    left = low + falls[-1] + 1 if len(falls) else low
    right = last + rises[0] if len(rises) else high
    return int(min(left, max(first - 1, low))), int(max(right, min(last + 1, high)))


def bootstrap_intervals(replicates, class_metric, position):
    """How much threshold and metric would vary with other images of the same kind.

    Parameters
    ----------
    replicates : float64 array, shape (REPLICATES, 2, len(COARSE_EDGES))
        One class of `Counts.replicates`.
    class_metric : callable, a value of CLASS_METRICS
    position : int
        The trained threshold is position / GRID.

    Returns
    -------
    x_interval : (float, float)
        Percentile interval of each replicate's own best threshold; widened, where need be, to hold the trained one.
    metric_interval : (float, float)
        Percentile interval of the metric at the trained threshold.
    band : float64 array, shape (2, len(COARSE_EDGES))
        The same interval of the metric at every coarse threshold.
    """
    # A replicate in which the class cannot be trained says nothing about its threshold.
    replicates = replicates[replicates.sum(axis=2).all(axis=1)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    x = position / GRID
    if not len(replicates):
        return (0.0, 1.0), (0.0, 1.0), np.tile([[0.0], [1.0]], len(COARSE_EDGES))
    tp, fp, fn, tn = confusion(replicates)
    metric = class_metric(tp, fp, fn, tn)
    edges = COARSE_EDGES / GRID
    inside = (edges >= OPT_BOUNDS[0]) & (edges <= OPT_BOUNDS[1])
    best = [sum(_widest_run(row == row.max(), edges[inside])) / 2 for row in metric[:, inside]]
    x_low, x_high = np.quantile(best, tails)

    # At x itself, between two coarse thresholds, the counts are interpolated.
    j = min(int(COARSE_BIN[position]), len(edges) - 1)
    share = (x - edges[j - 1]) / (edges[j] - edges[j - 1]) if j else 1.0
    at_x = [count[:, max(j - 1, 0)] * (1 - share) + count[:, j] * share for count in (tp, fp, fn, tn)]
    metric_low, metric_high = np.quantile(class_metric(*at_x), tails)
    return (
        (float(min(x_low, x)), float(max(x_high, x))),
        (float(metric_low), float(metric_high)),
        np.quantile(metric, tails, axis=0),
    )


def _degenerate(class_name, metric_name, metric, tp, fp, fn, low, middle, high):
    """Warnings for a metric that is best where the mask is useless."""
    positives = tp[0] + fn[0]
    if metric[low] == metric[middle]:
        useless = f"holds everything above {low / GRID:g}"
    else:
        top = np.flatnonzero((tp + fp)[low : high + 1])[-1] + low  # nothing is in the mask from there on
        if tp[middle] >= 0.01 * positives and (metric[top] < metric[middle] or tp[top] >= 0.01 * positives):
            return []
        useless = "holds less than 1 % of the class"
    return [
        f"{class_name}: {metric_name} is at its best also where the mask {useless}, so it says nothing about a good "
        "threshold; train with another metric, or another model"
    ]
