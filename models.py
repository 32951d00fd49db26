"""The science: the class metrics, the one inference pass, and the training of thresholds.

TensorFlow is imported only by the functions that run the network: a rerun from cached counts does without it.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from counts import COARSE_BIN, COARSE_EDGES, GRID, confusion
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


def _counting_step(network, height, width, num_classes):
    """Compile forward pass and histogram into one function, so that only counts leave the device."""
    import tensorflow as tf

    # value * (1 / 255) in float64, rounded to float32: what the networks saw in training
    network_input = tf.constant((np.arange(256) * (1 / 255)).astype(np.float32))
    no_bin = GRID + 1  # where invalid probabilities go
    coarse_bin = tf.constant(np.append(COARSE_BIN, len(COARSE_EDGES)).astype(np.int32))
    fine_bins, coarse_bins = GRID + 2, len(COARSE_EDGES) + 1

    def step(images, masks, used):
        n = tf.shape(images)[0]
        probabilities = network(tf.gather(network_input, tf.cast(images, tf.int32))[..., None], training=False)
        probabilities = tf.ensure_shape(tf.cast(probabilities, tf.float32), (None, height, width, num_classes))
        valid = (probabilities >= 0) & (probabilities <= 1)  # false for NaN
        bins = tf.where(valid, tf.cast(tf.math.ceil(probabilities * GRID), tf.int32), no_bin)
        image = tf.range(n)[:, None, None, None]
        # The rows of padding lie beyond both histograms, where bincount drops them.
        row = tf.where(image < used, 0, 2 * num_classes * n) + 2 * tf.range(num_classes) + tf.cast(masks, tf.int32)

        def histogram(index, size):
            return tf.raw_ops.DenseBincount(
                input=tf.reshape(index, [-1]), size=size, weights=tf.constant([], tf.int32), binary_output=False
            )

        fine = histogram(row * fine_bins + bins, 2 * num_classes * fine_bins)
        row_of_image = 2 * num_classes * image + row
        coarse = histogram(row_of_image * coarse_bins + tf.gather(coarse_bin, bins), n * 2 * num_classes * coarse_bins)
        return (
            tf.reshape(fine, (num_classes, 2, fine_bins)),
            tf.reshape(coarse, (-1, num_classes, 2, coarse_bins))[..., :-1],
            bins,
        )

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


def _padded(share, size):
    """Images and masks of a share, its last sample repeated up to `size`.

    Steps of one shape give a pixel the same probability, to the last bit, however the images are divided into
    batches, devices and processes: a convolution may sum in another order for another number of images.
    """
    _, images, masks = zip(*share, *[share[-1]] * (size - len(share)), strict=True)
    return np.stack(images), np.stack(masks)


def count_probabilities(network, samples, counts, class_names, batch_size, shown_names, on_smaller_batch):
    """Run the network once over the samples and add what it gives to `counts`: a generator, batch by batch.

    Parameters
    ----------
    network : tf.keras.Model
        From `build_network`.
    samples : iterable of (name, image, masks)
        image uint8, shape (height, width), 0 to 255; masks uint8, shape (height, width, classes), 0 or 1.
    counts : counts.Counts
    class_names : list of str
        For messages.
    batch_size : int
        Images per replica and step. When a batch does not fit into memory the size is halved for the rest of the pass.
    shown_names : set of str
        The images to keep for display.
    on_smaller_batch : callable taking the new batch size

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
    strategy = network.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    distributed_step = tf.function(lambda *shares: strategy.run(step.python_function, shares), reduce_retracing=True)

    def start(batch):
        """Hand a batch to the devices, a share to each; on a GPU this does not wait for the results."""
        shares = [batch[i : i + batch_size] for i in range(0, batch_size * replicas, batch_size)]
        arguments = [_padded(share or batch[:1], batch_size) + (np.int32(len(share)),) for share in shares]
        if replicas == 1:
            return [(batch, step(*arguments[0]))]
        distributed = [
            strategy.experimental_distribute_values_from_function(
                lambda context, values=values: tf.constant(values[context.replica_id_in_sync_group])
            )
            for values in zip(*arguments, strict=True)
        ]
        results = map(strategy.experimental_local_results, distributed_step(*distributed))
        return list(zip(shares, zip(*results, strict=True), strict=True))

    def read(results):
        """Wait for what the devices give: share, both histograms, and what is to be shown."""
        return [
            (
                share,
                fine.numpy(),
                coarse[: len(share)].numpy(),
                [(*sample, bins[j].numpy()) for j, sample in enumerate(share) if sample[0] in shown_names],
            )
            for share, (fine, coarse, bins) in results
        ]

    def finish(results):
        for share, fine, coarse, shown in read(results):
            for invalid in np.flatnonzero(fine[:, :, -1].any(axis=1)):
                raise ModelError(
                    f"{class_names[invalid]} has probabilities that are NaN or outside [0, 1]: the network must end in "
                    "sigmoid or softmax, and its weights must be finite"
                )
            if share:
                counts.add([name for name, _, _ in share], fine[:, :, :-1], coarse, shown)

    samples, started = iter(samples), None
    while True:
        batch = list(itertools.islice(samples, batch_size * replicas))
        try:
            results = start(batch) if batch else None
        except tf.errors.ResourceExhaustedError as error:
            if batch_size == 1:
                raise ModelError(f"one image of {width} x {height} pixels does not fit into memory") from error
            batch_size //= 2
            on_smaller_batch(batch_size)
            samples = itertools.chain(batch, samples)
            continue
        if started:  # one batch behind, so that the device has its next batch while the host counts this one
            finish(started)
            yield sum(len(share) for share, _ in started)
        if not batch:
            return
        started = results


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
