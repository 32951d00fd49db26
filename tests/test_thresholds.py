"""The trained threshold is the optimum, proved against independent truth."""

from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
import yaml
from build_sandbox import DATASET_ID, MODEL_ID, read_split
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from counts import COARSE_BIN, COARSE_EDGES, GRID, REPLICATES, Counts, bootstrap_weights, confusion


def exactly(name, tp, fp, fn, tn):
    """The textbook metric in exact arithmetic; the Matthews coefficient as its signed square."""

    def over(a, b):
        return Fraction(a, b) if b else Fraction(0)

    precision, recall, specificity = over(tp, tp + fp), over(tp, tp + fn), over(tn, tn + fp)
    covariance = tp * tn - fp * fn
    return {
        "iou_score": over(tp, tp + fp + fn),
        "f1_score": over(2 * precision * recall, precision + recall),
        "f2_score": over(5 * precision * recall, 4 * precision + recall),
        "precision": precision,
        "recall": recall,
        "binary_accuracy_tfkeras": over(tp + tn, tp + tn + fp + fn),
        "binary_accuracy_sm": over(tp + tn, tp + tn + fp + fn),
        "balanced_accuracy": (recall + specificity) / 2,
        "matthews_corrcoef": over(covariance * abs(covariance), (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }[name]


def counts_of(probabilities, truth):
    """Counts of one class from per-image arrays, by plain numpy."""
    counts = Counts.empty(1, 1, 1)
    for i, (p, t) in enumerate(zip(probabilities, truth, strict=True)):
        bins = np.ceil(np.float64(p) * GRID).astype(int)
        fine = np.stack([np.bincount(bins[t == value], minlength=GRID + 1) for value in (0, 1)])
        coarse = np.stack([np.bincount(COARSE_BIN[bins[t == value]], minlength=len(COARSE_EDGES)) for value in (0, 1)])
        counts.add([f"image {i}"], fine[None], coarse[None, None])
    return counts


def train(counts, metric="iou_score"):
    return models.train_prediction_threshold(counts, 0, "class0", metric, lambda *_: None)[0]


def sparse_histogram(draw):
    """A few filled bins: plateaus between them, ties among them, often single pixels."""
    pixels = st.one_of(st.integers(0, 3), st.integers(0, 10**12))
    rows = draw(st.lists(st.tuples(st.integers(0, GRID), pixels, pixels), min_size=1, max_size=8))
    histogram = np.zeros((2, GRID + 1), np.int64)
    for k, outside, inside in rows:
        histogram[:, k] += outside, inside
    histogram[draw(st.integers(0, 1)), draw(st.integers(0, GRID))] += 1
    return histogram


@given(st.data(), st.sampled_from(sorted(models.CLASS_METRICS)))
@settings(max_examples=300, deadline=None)
def test_the_optimum_is_the_optimum(data, name):
    histogram = sparse_histogram(data.draw)
    counts = Counts.empty(1, 1, 1)
    counts.histogram[0] = histogram
    counts.images = 1
    trained = train(counts, name)

    # Between two filled bins nothing changes, so a stretch a filled bin is all there is to compare.
    filled = np.flatnonzero(histogram.sum(axis=0))
    starts = [0, *filled[filled > 0].tolist()]
    ends = [*(start - 1 for start in starts[1:]), GRID]
    value = {}
    for start in starts:
        above = histogram[:, start + 1 :].sum(axis=1).tolist()
        below = histogram[:, : start + 1].sum(axis=1).tolist()
        value[start] = exactly(name, tp=above[1], fp=above[0], fn=below[1], tn=below[0])
    best = max(value.values())
    runs = []
    for start, end in zip(starts, ends, strict=True):
        if value[start] == best:
            runs.append([runs.pop()[0] if runs and runs[-1][1] == start - 1 else start, end])
    k = round(trained.x * GRID)
    if name == "matthews_corrcoef":  # a root is not a fraction: as good as float64 tells
        own = value[max(start for start in starts if start <= k)]
        assert float(own) == pytest.approx(float(best), rel=1e-12, abs=1e-12)
    else:
        widest = max(end - start for start, end in runs)
        first, last = next(run for run in runs if run[1] - run[0] == widest)
        assert k == (first + last) // 2
        assert trained.metric == pytest.approx(float(best), abs=1e-12)
    assert trained.x == k / GRID == np.float32(trained.x)
    assert trained.history[-1] == (trained.x, trained.metric)
    assert trained.plain[1] <= trained.metric
    assert trained.x_interval[0] <= trained.x <= trained.x_interval[1]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_iou_and_f1_have_the_same_threshold(data):
    counts = Counts.empty(1, 1, 1)
    counts.histogram[0] = sparse_histogram(data.draw)
    counts.images = 1
    assert train(counts, "iou_score").x == train(counts, "f1_score").x


def test_iou_and_f1_agree_where_rounding_would_tell_them_apart():
    # Neighbouring fractions tp / union, the second larger by 1 / (union * union): float64 cannot tell them apart.
    tp_above, union_above = 858993457, 2**31 - 1
    union = -pow(tp_above, -1, union_above) % union_above
    tp, union = (1 + tp_above * union) // union_above + tp_above, union + union_above
    counts = Counts.empty(1, 1, 1)
    counts.histogram[0, 1, [60000, 30000, 10]] = tp_above, tp - tp_above, union_above - tp
    counts.histogram[0, 0, [30000, 10]] = union - union_above, 10**10
    counts.images = 1
    assert Fraction(tp, union) > Fraction(tp_above, union_above)
    assert tp / union == tp_above / union_above
    for name in ("iou_score", "f1_score"):
        # the one that is really best, though the other one's stretch is the wider
        assert 10 <= train(counts, name).x * GRID < 30000


def test_two_peaks_do_not_mislead():
    rng = np.random.default_rng(0)
    # A broad low peak where a bounded search looks first, and a narrow high one close to 1.
    counts = Counts.empty(1, 1, 1)
    bins = np.concatenate([np.full(700, 65400), rng.integers(20000, 30000, 300)])
    np.add.at(counts.histogram[0, 1], bins, 1)
    np.add.at(counts.histogram[0, 0], np.concatenate([np.full(800, 65000), rng.integers(0, 20000, 9000)]), 1)
    counts.images = 1
    trained = train(counts)
    assert trained.plain[1] < trained.metric - 0.1
    assert 65000 <= trained.x * GRID < 65400


def test_every_threshold_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.random(4000) < 0.2
    p = np.where(truth, rng.beta(3, 2, 4000), rng.beta(1, 4, 4000)).astype(np.float32)
    tp, fp, fn, tn = confusion(counts_of([p], [truth.astype(int)]).histogram[0])

    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(truth, p)
    # scikit-learn counts p >= t; just below t, that is p > k / GRID for the largest k / GRID below t
    k = np.ceil(thresholds.astype(np.float64) * GRID).astype(int) - 1
    alone = np.diff(np.concatenate([[-1], k])) > 0  # where no smaller probability shares the bin
    alone &= np.append(np.diff(k) > 0, True)
    assert alone.sum() > 2000
    np.testing.assert_allclose(models.CLASS_METRICS["precision"](tp, fp, fn, tn)[k[alone]], precision[:-1][alone])
    np.testing.assert_allclose(models.CLASS_METRICS["recall"](tp, fp, fn, tn)[k[alone]], recall[:-1][alone])
    for threshold in (0, 1000, 20000, 40000, 65000, GRID):
        predicted = p > np.float32(threshold / GRID)
        counts = tp[threshold], fp[threshold], fn[threshold], tn[threshold]
        reference = {
            "iou_score": sklearn.metrics.jaccard_score(truth, predicted, zero_division=0),
            "f1_score": sklearn.metrics.f1_score(truth, predicted, zero_division=0),
            "f2_score": sklearn.metrics.fbeta_score(truth, predicted, beta=2, zero_division=0),
            "precision": sklearn.metrics.precision_score(truth, predicted, zero_division=0),
            "recall": sklearn.metrics.recall_score(truth, predicted),
            "binary_accuracy_tfkeras": sklearn.metrics.accuracy_score(truth, predicted),
            "binary_accuracy_sm": sklearn.metrics.accuracy_score(truth, predicted),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, predicted),
            "matthews_corrcoef": sklearn.metrics.matthews_corrcoef(truth, predicted),
        }
        assert reference.keys() == models.CLASS_METRICS.keys()
        for name, value in reference.items():
            array = models.CLASS_METRICS[name](*(np.array([count]) for count in counts))[0]
            assert array == pytest.approx(value, abs=1e-12), name
            assert float(models.CLASS_METRICS[name](*map(int, counts))) == pytest.approx(value, abs=1e-12), name


def test_no_distinct_probability_is_a_better_threshold():
    rng = np.random.default_rng(2)
    truth = rng.random(3000) < 0.1
    p = np.where(truth, rng.beta(2, 2, 3000), rng.beta(1, 5, 3000)).astype(np.float32)
    p = np.ceil(p * GRID) / GRID  # on the grid, so that the grid's optimum is the optimum
    trained = train(counts_of([p], [truth.astype(int)]))
    iou = [np.sum(truth & (p > t)) / np.sum(truth | (p > t)) for t in np.unique(p)]
    assert trained.metric == max(iou)


def test_counts_stay_exact_beyond_what_float32_can_count():
    counts = Counts.empty(1, 1, 1)
    counts.images = 0
    batch = np.zeros((1, 2, GRID + 1), np.int64)
    batch[0, 1, 50000] = 2**24 - 1
    none = np.zeros((1, 1, 2, len(COARSE_EDGES)), np.int64)
    one_more = np.zeros_like(batch)
    one_more[0, 1, 50000] = 1
    for addition in (batch, one_more, one_more, one_more):
        counts.add(["image"], addition, none)
    assert np.float32(2**24) + np.float32(1) == 2**24  # where float32 stops
    assert confusion(counts.histogram[0])[0][0] == 2**24 + 2
    # ... and in the weighted replicates, whose sums are larger still
    coarse = np.zeros((1, 1, 2, len(COARSE_EDGES)), np.int64)
    coarse[0, 0, 1, 7] = 2**40 + 1
    counts.add(["image"], one_more, coarse)
    np.testing.assert_array_equal(counts.replicates[:, 0, 1, 7], bootstrap_weights("image") * (2**40 + 1))


def test_poisson_weights_depend_on_the_name_alone_and_are_poisson():
    weights = np.stack([bootstrap_weights(f"slice {i}") for i in range(400)])
    assert weights.shape == (400, REPLICATES)
    np.testing.assert_array_equal(bootstrap_weights("slice 3"), weights[3])
    assert (weights[3] != weights[4]).any()
    assert weights.mean() == pytest.approx(1, abs=0.01)
    assert weights.var() == pytest.approx(1, abs=0.02)
    assert (weights == 0).mean() == pytest.approx(np.exp(-1), abs=0.005)
    # independent from image to image
    assert abs(np.corrcoef(weights[:50])[np.triu_indices(50, 1)]).max() < 0.25


def test_bounds_are_kept(monkeypatch):
    monkeypatch.setattr(models, "OPT_BOUNDS", [0.2, 0.4])
    rng = np.random.default_rng(3)
    truth = (rng.random(2000) < 0.3).astype(int)
    p = np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000))
    trained = train(counts_of([p], [truth]))
    assert all(0.2 <= x <= 0.4 for x, _ in trained.history)
    assert 0.2 <= trained.x_interval[0] <= trained.x <= trained.x_interval[1] <= 0.4


def test_a_class_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(models, "OPT_OPTIONS", {"maxiter": 2})
    counts = counts_of([np.array([0.2, 0.7])], [np.array([0, 1])])
    with pytest.raises(models.NotConvergedError, match="class0.*maxiter"):
        train(counts)


def test_untrainable_classes_are_named():
    for truth, words in (([0, 0], "no pixel"), ([1, 1], "every pixel")):
        counts = counts_of([np.array([0.2, 0.7])], [np.array(truth)])
        with pytest.raises(models.ModelError, match=f"class0 .class_a. .*{words}"):
            models.check_trainable(counts, ["class0 (class_a)"])


@pytest.mark.parametrize(("metric", "warns"), [("recall", True), ("precision", True), ("iou_score", False)])
def test_degenerate_optima_warn(metric, warns):
    rng = np.random.default_rng(4)
    truth = (rng.random(20000) < 0.3).astype(int)
    p = np.where(truth, rng.beta(8, 2, 20000), rng.beta(2, 8, 20000))
    p[np.flatnonzero(truth)[:5]] = 1.0  # a few pixels of the class at the very top
    assert bool(train(counts_of([p], [truth]), metric).warnings) == warns


def test_intervals_match_a_plain_bootstrap_over_images(sandbox):
    """The sandbox's network on its validation images, against resampling with replacement: all probabilities in
    memory, each resample optimised on its own."""
    model, split = sandbox / "models" / MODEL_ID, sandbox / "datasets" / DATASET_ID / "validation"
    train_config = yaml.safe_load((model / "config.yaml").read_text())["train_config"]
    network = models.build_network(train_config, 3, model / "model.hdf5")
    images, masks = read_split(split)
    data = [
        (f"slice {i}", np.rint(255 * image[..., 0]).astype(np.uint8), mask.astype(np.uint8))
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    counts = Counts.empty(3, *images.shape[1:3])
    list(models.count_probabilities(network, data, counts, ["class"] * 3, 10, set(), print))
    probabilities = network.predict(images, batch_size=10, verbose=0)

    rng = np.random.default_rng(5)
    resamples = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), 2000)  # how often each image
    thresholds = np.arange(0, GRID + 1, 64) / GRID
    for c in range(3):
        above = np.array(
            [
                [len(x) - np.searchsorted(np.sort(x), thresholds, side="right") for x in (p[~m], p[m])]
                for p, m in zip(probabilities[..., c], masks[..., c] == 1, strict=True)
            ]
        )
        fp, tp = np.tensordot(resamples, above, axes=(1, 0)).transpose(1, 0, 2)
        positives = resamples @ masks[..., c].sum(axis=(1, 2))
        iou = tp / (positives[:, None] + fp)
        trained = models.train_prediction_threshold(counts, c, "class", "iou_score", lambda *_: None)[0]
        at_x = [np.interp(trained.x, thresholds, row) for row in iou]
        for ours, plain, tolerance in (
            (trained.x_interval, thresholds[iou.argmax(axis=1)], 0.2),  # on the coarse grid
            (trained.metric_interval, at_x, 0.12),
        ):
            low, high = np.quantile(plain, [0.025, 0.975])
            assert ours == pytest.approx((low, high), abs=tolerance * (high - low)), c
