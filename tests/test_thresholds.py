"""The trained threshold is the optimum, compared with independent computations."""

import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from counts import THRESHOLDS, confusion
from errors import ConfigurationError, ModelError, NotConvergedError, UsageError

N = len(THRESHOLDS)
CONSTRAINED = ["precision_at_recall_0.95", "recall_at_precision_.5", "iou_score_at_recall_0.999"]


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


def reaches_level(name, tp, fp, fn, tn):
    """Whether a metric's constraint holds, in exact arithmetic."""
    if "_at_" not in name:
        return True
    constraint, _, level = name.partition("_at_")[2].partition("_")
    return exactly(constraint, tp, fp, fn, tn) >= Fraction(level)


def histogram_of(p, truth):
    """Histogram of one class from probabilities and truth, computed by plain NumPy."""
    bins = np.searchsorted(THRESHOLDS, np.asarray(p, np.float32))
    return np.stack([np.bincount(bins[np.asarray(truth) == value], minlength=N + 1) for value in (0, 1)])


def pixels(inside, outside):
    """Histogram of one class from {probability: number of pixels} inside and outside the mask."""
    histogram = np.zeros((2, N + 1), np.int64)
    for truth, numbers in ((0, outside), (1, inside)):
        histogram[truth, np.searchsorted(THRESHOLDS, np.array([*numbers], np.float32))] = [*numbers.values()]
    return histogram


def train(histogram, metric="iou_score"):
    return models.train_prediction_threshold(histogram, "class0", models.class_metric(metric), lambda *_: None)[0]


def sparse_histogram(draw):
    """Draw a histogram with few filled bins: it has plateaus and ties, and often single pixels."""
    pixels = st.one_of(st.integers(0, 3), st.integers(0, 10**12))
    rows = draw(st.lists(st.tuples(st.integers(0, N), pixels, pixels), min_size=1, max_size=8))
    histogram = np.zeros((2, N + 1), np.int64)
    for k, outside, inside in rows:
        histogram[:, k] += outside, inside
    histogram[draw(st.integers(0, 1)), draw(st.integers(0, N))] += 1
    return histogram


def stretches(histogram, low=0, high=N - 1):
    """(first, last, exact counts) of every stretch of thresholds between which no bin is filled."""
    filled = np.flatnonzero(histogram.sum(axis=0))
    starts = [low, *filled[(filled > low) & (filled <= high)].tolist()]
    for start, end in zip(starts, [*(start - 1 for start in starts[1:]), high], strict=True):
        (fp, tp), (tn, fn) = (
            part.sum(axis=1).tolist() for part in (histogram[:, start + 1 :], histogram[:, : start + 1])
        )
        yield start, end, (tp, fp, fn, tn)


def value_of(k):
    return Fraction(float(THRESHOLDS[k]))


# ---------------------------------------------------------------------------------------------------------------
# The optimum


@given(st.data(), st.sampled_from([*models.CLASS_METRICS, *CONSTRAINED]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_trained_threshold_is_the_exact_optimum(data, name, bounded):
    histogram = sparse_histogram(data.draw)
    low, high = sorted(data.draw(st.tuples(*2 * [st.integers(0, N - 1)]))) if bounded else (0, N - 1)
    runs, best = [], None  # runs: first and last of the best stretches, joined where they touch
    for first, last, counts in stretches(histogram, low, high):
        value = exactly(name.partition("_at_")[0], *counts)
        if not reaches_level(name, *counts) or (runs and value < best):
            continue
        if runs and value == best:
            runs.append([runs.pop()[0] if runs[-1][1] == first - 1 else first, last])
        else:
            runs, best = [[first, last]], value
    with pytest.MonkeyPatch.context() as patch:
        if bounded:
            patch.setattr(models, "OPT_BOUNDS", [float(THRESHOLDS[low]), float(THRESHOLDS[high])])
        if not runs:
            with pytest.raises(ModelError, match="does not reach"):
                train(histogram, name)
            return
        trained = train(histogram, name)
    width = max(value_of(last) - value_of(first) for first, last in runs)
    first, last = next(run for run in runs if value_of(run[1]) - value_of(run[0]) == width)
    assert trained.best_stretch == (float(THRESHOLDS[first]), float(THRESHOLDS[last]))
    assert first <= trained.index <= last
    middle = (value_of(first) + value_of(last)) / 2
    off = abs(value_of(trained.index) - middle)
    assert trained.index == first or abs(value_of(trained.index - 1) - middle) > off
    assert trained.index == last or abs(value_of(trained.index + 1) - middle) >= off

    if name == "matthews_corrcoef":
        assert abs(trained.metric) * trained.metric == pytest.approx(float(best), rel=1e-9, abs=1e-12)
    else:
        assert trained.metric == pytest.approx(float(best), abs=1e-12)
    assert trained.x == THRESHOLDS[trained.index] == np.float32(trained.x)
    assert 0 < trained.x < 1
    assert trained.history[-1] == (trained.x, trained.metric)
    assert trained.nfev == len(trained.history)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_iou_and_f1_have_the_same_threshold(data):
    histogram = sparse_histogram(data.draw)
    assert train(histogram, "iou_score").x == train(histogram, "f1_score").x


def test_iou_and_f1_agree_where_rounding_would_make_them_differ():
    # Neighbouring fractions tp / union, the second larger by 1 / (union * union): they are equal in float64.
    tp_above, union_above = 858993457, 2**31 - 1
    union = -pow(tp_above, -1, union_above) % union_above
    tp, union = (1 + tp_above * union) // union_above + tp_above, union + union_above
    histogram = np.zeros((2, N + 1), np.int64)
    histogram[1, [100000, 60000, 10]] = tp_above, tp - tp_above, union_above - tp
    histogram[0, [60000, 10]] = union - union_above, 10**10
    assert Fraction(tp, union) > Fraction(tp_above, union_above)
    assert tp / union == tp_above / union_above
    for name in ("iou_score", "f1_score"):
        # the one that is really best, although the stretch of the other is wider
        assert 10 <= train(histogram, name).index < 60000


def test_the_matthews_coefficient_of_integers_is_in_exact_order():
    rng = np.random.default_rng(0)
    metric = models.class_metric("matthews_corrcoef")
    equal_in_float64 = 0
    for _ in range(300):
        counts = [int(10**power) for power in rng.uniform(0, 18, 4)]
        others = [max(0, count + int(step)) for count, step in zip(counts, rng.integers(-1, 2, 4), strict=True)]
        exact = exactly("matthews_corrcoef", *counts), exactly("matthews_corrcoef", *others)
        ours = metric(*counts), metric(*others)
        assert (ours[0] < ours[1], ours[0] > ours[1]) == (exact[0] < exact[1], exact[0] > exact[1])
        equal_in_float64 += exact[0] != exact[1] and float(ours[0]) == float(ours[1])
    assert equal_in_float64 > 0


@pytest.mark.parametrize("name", ["balanced_accuracy", "matthews_corrcoef"])
def test_the_optimum_is_found_where_rounding_reverses_the_order(name):
    rng = np.random.default_rng(0)
    metric = models.class_metric(name)
    positives, negatives = 10**9 + 7, 10**17 + 39
    for _ in range(1000):
        tp, more_tp = rng.integers(10**8, 5 * 10**8, 2).tolist()
        fp = int(rng.integers(10**14, 10**15))
        higher = positives - tp, negatives - fp
        # The most false positives that a lower threshold may add and still be better, by bisection.
        few, many = 0, negatives - fp
        exact = exactly(name, tp, fp, *higher)
        while many - few > 1:
            more_fp = (few + many) // 2
            counts = tp + more_tp, fp + more_fp, higher[0] - more_tp, higher[1] - more_fp
            few, many = (more_fp, many) if exactly(name, *counts) > exact else (few, more_fp)
        counts = [(tp, fp, *higher), (tp + more_tp, fp + few, higher[0] - more_tp, higher[1] - few)]
        ours = metric(*np.array(counts).T)
        if few and ours[0] > ours[1]:  # although the second one is better
            break
    else:
        pytest.fail("no such case")
    histogram = np.zeros((2, N + 1), np.int64)
    histogram[1, [100000, 50000, 0]] = tp, more_tp, positives - tp - more_tp
    histogram[0, [100000, 50000, 0]] = fp, few, negatives - fp - few
    assert train(histogram, name).index < 50000


def test_one_pixel_of_many_decides():
    # With this false positive the IoU rounds to 1 in float64, over a wider stretch; without it, it is 1.
    assert 0.6 <= train(pixels({0.9: 10**16}, {0.6: 1, 0.01: 100})).x < 0.9


def test_the_widest_stretch_spans_the_largest_range_not_the_most_thresholds():
    histogram = pixels({0.4: 2, 2**-20: 2}, {0.3: 4})  # IoU 1/2 from 2**-40 to 2**-20 and from 0.3 to 0.4
    assert train(histogram).x == pytest.approx(0.35, abs=1e-5)
    histogram = pixels({0.9: 2, 0.4: 2}, {0.85: 4})  # IoU 1/2 from 2**-40 to 0.4 and from 0.85 to 0.9
    assert train(histogram).x == pytest.approx(0.2, abs=1e-5)


def test_the_higher_of_two_peaks_is_found():
    rng = np.random.default_rng(0)
    # A broad low peak, where a bounded search begins, and a narrow high one close to 1.
    p = np.concatenate(
        [np.full(700, 0.998), rng.uniform(0.3, 0.45, 300), np.full(800, 0.99), rng.uniform(0, 0.3, 9000)]
    )
    truth = np.arange(len(p)) < 1000
    trained = train(histogram_of(p, truth))
    assert 0.99 <= trained.x < 0.998
    assert trained.metric == 0.7
    assert max(metric for _, metric in trained.history[:-1]) < 0.6


@pytest.mark.parametrize("shift", [-20, -8, 0, 14])
def test_the_optimum_is_found_for_shifted_logits(shift):
    rng = np.random.default_rng(2)
    truth = rng.random(20000) < 0.1
    p = (1 / (1 + np.exp(-(rng.normal(np.where(truth, 1, -1), 1.5) + shift)))).astype(np.float32)
    trained = train(histogram_of(p, truth))
    order = np.argsort(-p, kind="stable")
    tp, ends = np.cumsum(truth[order]), np.append(np.diff(p[order]) != 0, True)  # with everything from p[order] up
    iou = tp / (truth.sum() + np.arange(1, len(p) + 1) - tp)
    above = p > np.float32(trained.x)
    assert trained.metric == np.sum(truth & above) / np.sum(truth | above)
    assert iou[ends].max() - 2e-5 <= trained.metric <= iou[ends].max()
    assert not trained.warnings


def test_every_threshold_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.random(4000) < 0.2
    p = np.where(truth, rng.beta(3, 2, 4000), rng.beta(1, 4, 4000)).astype(np.float32)
    histogram = histogram_of(p, truth)
    metric = models.class_metric("precision_at_recall_0.9")
    trained, curve = models.train_prediction_threshold(histogram, "class0", metric, lambda *_: None)

    # scikit-learn counts p >= t; this equals p > THRESHOLDS[k] for the last threshold below t
    precision, recall, distinct = sklearn.metrics.precision_recall_curve(truth, p)
    k = np.searchsorted(THRESHOLDS, distinct) - 1
    single = (k >= 0) & (np.diff(k, prepend=-2) > 0)  # no smaller probability is in the same bin
    assert single.sum() > 3000
    np.testing.assert_allclose(curve.precision[k[single]], precision[:-1][single])
    np.testing.assert_allclose(curve.recall[k[single]], recall[:-1][single])
    np.testing.assert_array_equal(curve.metric, curve.precision)
    assert trained.metric == pytest.approx(precision[recall >= 0.9].max(), abs=1e-12)
    assert trained.metric_at_half == pytest.approx(sklearn.metrics.precision_score(truth, p > 0.5), abs=1e-12)
    assert trained.allowed_at_half == (sklearn.metrics.recall_score(truth, p > 0.5) >= 0.9)

    for k in (0, 20000, 66637, 90000, N - 1):
        predicted = p > THRESHOLDS[k]
        counts = curve.tp[k], curve.fp[k], curve.fn[k], curve.tn[k]
        assert counts == tuple(
            np.sum((predicted == positive) & (truth == right)) for positive, right in ((1, 1), (1, 0), (0, 1), (0, 0))
        )
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
            metric = models.class_metric(name)
            assert metric(*(np.array([count]) for count in counts))[0] == pytest.approx(value, abs=1e-12), name
            assert float(metric(*map(int, counts))) == pytest.approx(value, abs=1e-12), name


# ---------------------------------------------------------------------------------------------------------------
# Names, levels, and the rule for metrics


def test_the_level_is_reached_exactly():
    tenth = 10**16  # recall is 19 / 20 at the higher probability, then less by one pixel
    for pixels, allowed in ((19 * tenth, True), (19 * tenth - 1, False)):
        assert pixels / (20 * tenth) == 0.95  # equal in float64
        histogram = np.zeros((2, N + 1), np.int64)
        histogram[1, [90000, 30000]] = pixels, 20 * tenth - pixels
        histogram[0, [60000, 10]] = tenth, tenth
        trained = train(histogram, "precision_at_recall_0.95")
        assert (60000 <= trained.index < 90000) == allowed
        assert trained.metric == pytest.approx(1.0 if allowed else 20 / 21, abs=1e-12)
        metric = models.class_metric("recall_at_precision_0.95")
        assert metric.allowed(pixels, 20 * tenth - pixels, 1, 1) == allowed
        arrays = (np.array([[count]]) for count in (pixels, 20 * tenth - pixels, 1, 1))
        np.testing.assert_array_equal(metric.allowed(*arrays), [[allowed]])


def test_a_level_that_is_not_reached_is_an_error_that_names_the_highest(monkeypatch):
    # 70 pixels of the class at 0.6, 25 at 0.25, 5 at 0; all others at 0.125
    p, truth = np.repeat([0.6, 0.25, 0.0, 0.125], [70, 25, 5, 900]), np.repeat([1, 0], [100, 900])
    assert train(histogram_of(p, truth), "precision_at_recall_0.95").metric == 1
    with pytest.raises(
        ModelError, match=r"class0: recall .*_\.951 at any threshold: .* highest is 0\.95, at 9\.\S+e-13"
    ):
        train(histogram_of(p, truth), "iou_score_at_recall_.951")
    monkeypatch.setattr(models, "OPT_BOUNDS", [0.5, 1])
    with pytest.raises(ModelError, match=r"highest is 0\.333333, at 0\.5;"):  # rounded down, so that it can be reached
        train(pixels({0.9: 1, 0.3: 2}, {0.1: 9}), "precision_at_recall_0.5")
    with pytest.raises(ModelError, match=r"class0: recall .* within OPT_BOUNDS.* highest is 0\.7, at 0\.5; widen them"):
        train(histogram_of(p, truth), "precision_at_recall_0.95")


@pytest.mark.parametrize(
    ("name", "level"),
    [("precision_at_recall_0.95", 0.95), ("recall_at_precision_.9", 0.9), ("iou_score_at_recall_0.999", 0.999)],
)
def test_names_with_a_level(name, level):
    metric = models.class_metric(name)
    assert metric.name == name
    assert metric.level == Fraction(str(level))
    models.check_metric(metric)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("accuracy", [*models.CLASS_METRICS, "precision_at_recall_<level>", "iou_score_at_recall_<level>"]),
        ("", ["iou_score"]),
        ("f1_score_at_recall_0.9", ["recall_at_precision_<level>"]),
        ("precision_at_recall", ["precision_at_recall_<level>"]),
        ("binary_cross_entropy", ["does not depend on a threshold"]),
        *(
            (f"precision_at_recall_{level}", ["between 0 and 1", "precision_at_recall_0.95"])
            for level in ["", "0", "0.0", "1", "1.0", "95", "-0.5", "nan", "1e-3", "0,9", "٠.٩", "0." + 40 * "9"]
        ),
    ],
)
def test_a_name_that_is_no_metric_is_an_error(name, words):
    with pytest.raises(UsageError) as error:
        models.class_metric(name)
    assert all(word in str(error.value) for word in ["--optimizing-class-metric", *words])


def raises(tp, fp, fn, tn):
    raise KeyError("tp")


def in_place(tp, fp, fn, tn):
    tp += fp
    return models.ratio(tp, tp + fn)


def nan_where_large(tp, fp, fn, tn):
    if isinstance(tp, np.ndarray):
        return np.where(tp > 1000, np.nan, models.ratio(tp, tp + fn))
    return models.ratio(tp, tp + fn)


def integers_differ(tp, fp, fn, tn):
    return models.ratio(tp, tp + fn) if isinstance(tp, np.ndarray) else models.ratio(tp, tp + fp)


@pytest.mark.parametrize(
    "function",
    [
        raises,
        in_place,
        integers_differ,
        lambda tp, fp, fn, tn: tp / (tp + fp),  # NaN for 0 / 0
        lambda tp, fp, fn, tn: np.nan_to_num(tp / (tp + fp)),  # ZeroDivisionError for Python integers
        lambda tp, fp, fn, tn: 0.5,
        lambda tp, fp, fn, tn: models.ratio(tp.sum(), tp.sum() + fp.sum()),
        lambda tp, fp, fn, tn: models.ratio(tp, tp + fp)[:-1],
        lambda tp, fp, fn, tn: tp - fp,  # int64
        lambda tp, fp, fn, tn: models.ratio(tp, tp + fp).astype(np.float32),
        lambda tp, fp: models.ratio(tp, tp + fp),
        lambda tp, fp, fn, tn: None,
    ],
)
def test_a_metric_that_breaks_the_rule_is_named(function, monkeypatch):
    monkeypatch.setitem(models.CLASS_METRICS, "my_metric", function)
    with pytest.raises(ConfigurationError, match="my_metric.*models.py.*ratio"):
        models.check_metric(models.class_metric("my_metric"))


@pytest.mark.parametrize("name", models.CLASS_METRICS)
def test_all_metrics_follow_the_rule(name):
    models.check_metric(models.class_metric(name))


def test_a_metric_that_breaks_the_rule_on_real_counts_only(monkeypatch):
    monkeypatch.setitem(models.CLASS_METRICS, "my_metric", nan_where_large)
    models.check_metric(models.class_metric("my_metric"))
    with pytest.raises(ConfigurationError, match="my_metric.* nan .*models.py|my_metric.*models.py.* nan "):
        train(histogram_of(np.repeat([0.2, 0.7], 2000), np.repeat([0, 1], 2000)), "my_metric")


# ---------------------------------------------------------------------------------------------------------------
# minimize_scalar and its configuration


def configure(monkeypatch, **configuration):
    for name, value in configuration.items():
        monkeypatch.setattr(models, name, value)


ONE_STEP = [[float(THRESHOLDS[k]), float(THRESHOLDS[k + 1])] for k in (0, 1000, 66000, N - 2)]


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
@pytest.mark.parametrize("bounds", [[0, 1], [0.2, 0.4], [0.0, 1e-9], [0.9999, 1.0], [0.5, 0.5], *ONE_STEP], ids=str)
def test_every_method_works_with_all_bounds(method, bounds, monkeypatch):
    configure(monkeypatch, OPT_METHOD=method, OPT_BOUNDS=bounds)
    models.optimisation_range()
    calls, original = [], scipy.optimize.minimize_scalar
    monkeypatch.setattr(scipy.optimize, "minimize_scalar", lambda *a, **k: calls.append(k) or original(*a, **k))
    rng = np.random.default_rng(3)
    truth = rng.random(2000) < 0.3
    networks = {
        "good": np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)),
        "saturated": np.where(truth, rng.beta(0.05, 0.01, 2000), rng.beta(0.01, 0.05, 2000)),
        "constant": np.full(2000, 0.3),
    }
    for p in networks.values():
        calls.clear()
        histogram = histogram_of(p, truth)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained = train(histogram)
        assert len(calls) == 1
        assert calls[0]["method"] == method
        thresholds = THRESHOLDS.astype(np.float64)
        within = (thresholds >= bounds[0]) & (thresholds <= bounds[1])
        iou = models.CLASS_METRICS["iou_score"](*confusion(histogram))
        assert trained.metric == iou[within].max()
        assert bounds[0] <= trained.x <= bounds[1]
        assert trained.success is True
        assert type(trained.status) is int
        assert "\n" not in trained.message
        assert 2 <= trained.nfev == len(trained.history) < 120
        assert all(t in thresholds[within] and m == iou[thresholds == t] for t, m in trained.history)


def test_every_evaluation_is_shown_and_uses_the_nearest_threshold(monkeypatch):
    asked, shown, original = [], [], scipy.optimize.minimize_scalar

    def spy(objective, **configuration):
        return original(lambda x: asked.append(x) or objective(x), **configuration)

    monkeypatch.setattr(scipy.optimize, "minimize_scalar", spy)
    configure(monkeypatch, OPT_TOL=1e-7)  # finer than the list
    rng = np.random.default_rng(4)
    truth = rng.random(2000) < 0.3
    histogram = histogram_of(np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)), truth)
    trained, curve = models.train_prediction_threshold(
        histogram, "class0", models.class_metric("f1_score"), lambda *evaluation: shown.append(evaluation)
    )
    nearest = [int(np.argmin(np.abs(THRESHOLDS - np.float64(x)))) for x in asked]
    assert trained.history[:-1] == [(THRESHOLDS[k], curve.metric[k]) for k in nearest]
    assert shown == [(n, *point) for n, point in enumerate(trained.history)]


def test_the_search_avoids_thresholds_that_miss_the_level(monkeypatch):
    losses, original = [], scipy.optimize.minimize_scalar

    def spy(objective, **configuration):
        losses.extend(map(objective, np.float64(THRESHOLDS[::64])))
        return original(objective, **configuration)

    monkeypatch.setattr(scipy.optimize, "minimize_scalar", spy)
    rng = np.random.default_rng(5)
    truth = rng.random(2000) < 0.3
    histogram = histogram_of(np.where(truth, rng.beta(8, 2, 2000), rng.beta(2, 8, 2000)), truth)
    metric = models.class_metric("precision_at_recall_0.8")
    curve = models.train_prediction_threshold(histogram, "class0", metric, lambda *_: None)[1]
    allowed, losses = curve.recall[::64] >= 0.8, np.array(losses)
    np.testing.assert_array_equal(losses[allowed], 1 - curve.metric[::64][allowed])
    assert losses[~allowed].min() > losses[allowed].max()
    farther, worse = np.diff(curve.recall[::64][~allowed]) < 0, np.diff(losses[~allowed]) > 0
    np.testing.assert_array_equal(farther, worse)


@pytest.mark.parametrize("method", ["bounded", "brent", "golden"])
def test_every_option_reaches_the_method(method, monkeypatch, capsys):
    tolerance = {"bounded": "xatol"}.get(method, "xtol")
    histogram = histogram_of([0.2, 0.4, 0.3, 0.7], [0, 0, 1, 1])
    evaluations = {}
    for tol in (0.1, 1e-5):
        configure(monkeypatch, OPT_METHOD=method, OPT_TOL=0.01, OPT_OPTIONS={tolerance: tol, "disp": 2, "maxiter": 400})
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # SciPy warns about options that it does not know
            evaluations[f"{tolerance} {tol}"] = train(histogram).nfev
        assert capsys.readouterr().out
        configure(monkeypatch, OPT_TOL=tol, OPT_OPTIONS={})
        evaluations[f"OPT_TOL {tol}"] = train(histogram).nfev
    coarse, coarse_too, fine, fine_too = evaluations.values()
    assert coarse == coarse_too < fine == fine_too
    configure(monkeypatch, OPT_OPTIONS={"maxiter": 2})
    with pytest.raises(NotConvergedError, match="class0.*maxiter.*OPT_TOL.*models.py"):
        train(histogram)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("OPT_BOUNDS", bounds)
            for bounds in (
                None,
                0.5,
                [0.5],
                [0, 0.5, 1],
                ["0", "1"],
                [0, None],
                [False, True],
                [float("nan"), 1],
                [0, float("nan")],
                [-0.1, 1],
                [0, 1.5],
                [0.6, 0.4],
                [0.0, 0.0],
                [1.0, 1.0],
                [0.50001, 0.50001],  # between two thresholds
                [np.float64(0), np.float64(1)],  # no plain YAML
            )
        ),
        *(("OPT_METHOD", method) for method in ("powell", "", None, min, ["bounded"])),
        *(("OPT_TOL", tol) for tol in (-1e-4, float("nan"), float("inf"), "1e-4", None, True)),
        *(
            ("OPT_OPTIONS", options)
            for options in (
                None,
                ["maxiter"],
                {"maxiter": 0},
                {"maxiter": -1},
                {"maxiter": 10.5},
                {"maxiter": None},
                {"xtol": 1e-3},  # brent's and golden's
                {"xatol": -1},
                {"xatol": float("nan")},
                {"disp": "yes"},
                {"max_iter": 500},
                {1: 2},
            )
        ),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_named(name, value, monkeypatch):
    models.optimisation_range()
    monkeypatch.setattr(models, name, value)
    with pytest.raises(ConfigurationError, match=f"{name} = .*models.py"):
        models.optimisation_range()


def test_untrainable_classes_are_named():
    for truth, words in (([0, 0], "no pixel"), ([1, 1], "every pixel")):
        counts = SimpleNamespace(histogram=histogram_of([0.2, 0.7], truth)[None], images=1)
        with pytest.raises(ModelError, match=f"class0 .class_a. .*{words}"):
            models.check_trainable(counts, ["class0 (class_a)"])


# ---------------------------------------------------------------------------------------------------------------
# Warnings

CAUSES = {
    "bounds": "OPT_BOUNDS",
    "perfect": "right in every pixel",
    "everything": "% of the pixels outside the class",
    "nothing": "mask is empty",
    "little": "% of the class",
    "not found": "does not find this class",
}


GOOD = {0.9: 80, 0.6: 15, 0.2: 5}, {0.95: 2, 0.5: 8, 0.1: 90, 0.01: 900}


@pytest.mark.parametrize(
    ("cause", "metric", "bounds", "histogram"),
    [
        *((None, name, [0, 1], pixels(*GOOD)) for name in models.CLASS_METRICS if name not in ("recall", "precision")),
        *((None, name, [0, 1], pixels(*GOOD)) for name in ("precision_at_recall_0.95", "recall_at_precision_0.5")),
        # precision is higher where recall does not reach the level
        (None, "precision_at_recall_0.95", [0, 1], pixels({0.9: 80, 0.6: 20}, {0.7: 10, 0.1: 900})),
        (None, "iou_score", [0.5, 0.6], pixels(*GOOD)),  # bounds that hold the optimum
        (None, "iou_score", [0.5001, 0.5003], pixels(*GOOD)),  # bounds within the optimum's stretch
        (None, "iou_score", [0, 1], pixels({1.0: 50, 1e-6: 50}, {0.0: 900, 1.0: 10})),  # saturated
        ("bounds", "iou_score", [0.7, 1], pixels(*GOOD)),
        ("bounds", "iou_score", [0, 0.3], pixels(*GOOD)),
        ("bounds", "iou_score", [0.999, 1], pixels(*GOOD)),  # where the mask is empty
        ("bounds", "iou_score", [0, 0.001], pixels(*GOOD)),  # where it holds everything
        (
            "bounds",
            "iou_score",
            [0.7, 1],
            pixels({0.6: 100}, {0.1: 900}),
        ),  # perfect outside the bounds
        ("perfect", "iou_score", [0, 1], pixels({0.6: 100}, {0.1: 900})),
        ("perfect", "iou_score", [0, 1], pixels({1.0: 100}, {0.0: 900})),
        ("perfect", "f1_score", [0, 1], pixels({1.0: 1}, {0.9: 900})),
        ("perfect", "iou_score", [0, 1], pixels({1e-6: 100}, {1e-7: 900})),
        ("perfect", "recall", [0, 1], pixels({0.6: 100}, {0.1: 900})),
        ("everything", "recall", [0, 1], pixels(*GOOD)),
        ("everything", "recall", [0, 1], pixels({0.9: 80, 0.04: 20}, {0.05: 300, 1e-4: 150, 0.0: 450})),
        ("everything", "iou_score", [0, 1], pixels({0.9: 500, 0.1: 480}, {0.5: 20})),
        ("everything", "iou_score", [0, 1], pixels({0.3: 980}, {0.35: 200, 1e-3: 1})),
        ("everything", "binary_accuracy_sm", [0, 1], pixels({0.3: 9900}, {0.4: 100})),
        ("everything", "recall_at_precision_0.3", [0, 1], pixels({0.9: 40, 0.2: 60}, {0.7: 200})),
        ("nothing", "binary_accuracy_tfkeras", [0, 1], pixels({0.3: 10}, {0.4: 990})),
        ("little", "precision", [0, 1], pixels({0.999: 1, 0.9: 499, 0.5: 500}, {0.7: 100, 0.1: 1000})),
        ("little", "precision", [0.4, 1], pixels({0.999: 1, 0.9: 499, 0.5: 500}, {0.7: 100, 0.1: 1000})),
        ("not found", "iou_score", [0, 1], pixels({0.0: 100}, {0.5: 900})),
        ("not found", "iou_score", [0, 1], pixels({0.0: 995, 0.7: 5}, {0.5: 900})),
        ("not found", "recall", [0, 1], pixels({1e-13: 100}, {0.5: 900})),
    ],
)
def test_a_warning_names_its_cause_and_no_other(cause, metric, bounds, histogram, monkeypatch):
    configure(monkeypatch, OPT_BOUNDS=bounds)
    given = " ".join(train(histogram, metric).warnings)
    assert [name for name, words in CAUSES.items() if words in given] == ([cause] if cause else []), given
    assert bool(given) == bool(cause)
    assert given.startswith("class0: " if cause else "")
