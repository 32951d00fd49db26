"""Every number that a user reads, from small real runs, is compared once with an independent truth.

For the truth, Pillow reads the images, `predict` of tf.keras gives the probabilities, `p > t` the counts, and a plain
bootstrap the intervals. The metrics are written out here, and the best thresholds are found by trying all.
"""

import csv
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import MODEL, MODEL_ID, SPLIT, arguments, run_here, write_split
from PIL import Image
from scipy import stats
from scipy.special import expit, logit

import figures
from counts import THRESHOLDS

STACKS = [f"stack_{letter}" for letter in "abcdefgh"]  # of three slices each
CLASSES = ("class0", "class1")
HEIGHT, WIDTH = 64, 96
NUMBERS = {
    "iou_score": lambda tp, fp, fn, tn: tp / max(tp + fp + fn, 1),
    "f1_score": lambda tp, fp, fn, tn: 2 * tp / max(2 * tp + fp + fn, 1),
    "f2_score": lambda tp, fp, fn, tn: 5 * tp / max(5 * tp + fp + 4 * fn, 1),
    "precision": lambda tp, fp, fn, tn: tp / max(tp + fp, 1),
    "recall": lambda tp, fp, fn, tn: tp / max(tp + fn, 1),
    "binary_accuracy_tfkeras": lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn),
    "binary_accuracy_sm": lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn: (tp / (tp + fn) + tn / (tn + fp)) / 2,
    "matthews_corrcoef": lambda tp, fp, fn, tn: (
        (tp * tn - fp * fn) / max(np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), 1)
    ),
}


def confusion(p, truth, threshold):
    predicted = p > np.float32(threshold)
    return tuple(
        int(np.count_nonzero(pixels))
        for pixels in (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    )


@pytest.fixture(scope="module")
def bucket_template(make_once, tiny_bucket_template, tiny_network):
    """Stacks whose masks the network predicts partly right; masks of 0 and 255 in class_0, of one bit in class_1."""

    def fill(folder):
        shutil.copytree(tiny_bucket_template, folder / "bucket")
        split = folder / "bucket" / SPLIT
        shutil.rmtree(split)
        rng = np.random.default_rng(5)
        number = 3 * len(STACKS)
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        images = np.stack(
            [
                120 + 80 * np.sin(x / rng.uniform(4, 12) + y / rng.uniform(4, 12)) + rng.normal(0, 20, (HEIGHT, WIDTH))
                for _ in range(number)
            ]
        )
        images = images.clip(0, 255).astype(np.uint8)
        p = predict(tiny_network, images, batch_size=5)
        # Masks that agree with the network on some blocks more than on others, so that intervals have a width.
        level = np.quantile(p, [0.75, 0.4], axis=(0, 1, 2)).diagonal()
        noise = rng.normal(0, 1, p.shape) * p.std(axis=(0, 1, 2))
        trust = rng.uniform(0.3, 1.5, number)[:, None, None, None]
        shift = rng.uniform(-0.4, 0.4, number)[:, None, None, None] * p.std(axis=(0, 1, 2))
        masks = (p + noise / trust + shift > level).astype(np.uint8)
        write_split(split, images, masks)
        for i in range(number):
            name, new = f"slice_{i:04d}.png", f"{STACKS[i // 3]}-{i % 3}.png"
            (split / "images" / name).rename(split / "images" / new)
            (split / "masks/class_0" / name).unlink()
            Image.fromarray(255 * masks[i, ..., 0]).save(split / "masks/class_0" / new)
            (split / "masks/class_1" / name).unlink()
            Image.fromarray(masks[i, ..., 1] == 1).save(split / "masks/class_1" / new)
        (split.parent / "config.yaml").write_text(
            yaml.safe_dump({"dataset_config": {"target_size": [96, 64], "dataset_split": {"validation": STACKS}}})
        )

    return make_once("truth", fill) / "bucket"


def predict(network, images, batch_size):
    """Probabilities from batches of one size, as in the run, because their last bit may depend on the size."""
    x = (images / 255).astype(np.float32)[..., None]
    padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % batch_size, axis=0)])
    return network.predict(padded, batch_size=batch_size, verbose=0)[: len(x)]


@pytest.fixture(scope="module", params=["iou_score", "precision_at_recall_0.7"])
def run(request, bucket_template, tiny_network, tmp_path_factory):
    """What a run gives to the user, and what is needed to compute the truth."""
    folder = tmp_path_factory.mktemp("run")
    bucket = Path(shutil.copytree(bucket_template, folder / "bucket"))
    given = arguments("bucket", batch_size=5, optimizing_class_metric=request.param)
    drawn, stdout = {}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves_figure", "draw_slices"):
            patch.setattr(figures, name, keep(drawn, name, getattr(figures, name)))
        patch.setattr("sys.stdout", stdout)
        patch.chdir(folder)
        run_here(patch, *given)
    (path,) = (bucket / MODEL).glob("model_thresholds_*.yaml")
    result = yaml.safe_load(path.read_text())
    rows = list(csv.DictReader(io.StringIO(path.with_name(f"{path.stem}_curves.csv").read_text())))

    split = bucket / SPLIT
    names = sorted(path.name for path in (split / "images").iterdir())
    images = np.stack([np.asarray(Image.open(split / "images" / name)) for name in names])
    p = predict(tiny_network, images, 5)
    truth = np.stack(
        [
            [np.asarray(Image.open(split / f"masks/class_{c}" / name).convert("L")) > 0 for name in names]
            for c in range(2)
        ],
        axis=-1,
    )
    assert 0.05 < truth.mean() < 0.95
    return SimpleNamespace(
        metric=request.param,
        result=result,
        output=result["metadata"]["thresholds_training_output"],
        rows=rows,
        stdout=stdout.getvalue(),
        figure=drawn["curves_figure"][1],
        slices=drawn["draw_slices"][0],
        names=names,
        images=images,
        p=p,
        truth=truth,
        curves=[Curves(p[..., c], truth[..., c], request.param) for c in range(2)],
    )


def keep(drawn, name, function):
    def call(*given):
        value = function(*given)
        drawn[name] = given[0], value
        return value

    return call


class Curves:
    """Counts of one class at every threshold of the list, for each stack and for all images; computed by sorting."""

    def __init__(self, p, truth, metric):
        self.metric = metric
        stacks = p.reshape(len(STACKS), -1), truth.reshape(len(STACKS), -1)
        self.of_stacks = np.array(
            [[above(p[truth]), above(p[~truth])] for p, truth in zip(*stacks, strict=True)]
        )  # (stacks, 2, N): tp, fp
        self.positives = stacks[1].sum(axis=1)
        self.negatives = stacks[1].shape[1] - self.positives
        self.counts = self.drawn(np.ones(len(STACKS)))
        self.values = self.value(*self.counts)

    def drawn(self, weights):
        """tp, fp, fn, tn of a replicate; `weights` says how often each stack was drawn."""
        tp, fp = np.tensordot(weights, self.of_stacks, 1)
        return tp, fp, weights @ self.positives - tp, weights @ self.negatives - fp

    def value(self, tp, fp, fn, tn):
        if self.metric == "iou_score":
            return tp / (tp + fp + fn)
        return np.divide(tp, tp + fp, out=np.zeros(len(tp)), where=tp + fp > 0)  # precision

    def choose(self, tp, fp, fn, tn):
        """The index of the best threshold: the middle of the widest stretch of best ones."""
        values = self.value(tp, fp, fn, tn)
        if self.metric != "iou_score":
            values = np.where(tp / (tp + fn) >= 0.7, values, -1)
        best = np.flatnonzero(values == values.max())
        stretches = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
        t = THRESHOLDS.astype(float)
        stretch = max(stretches, key=lambda s: t[s[-1]] - t[s[0]])
        return stretch[np.argmin(abs(t[stretch] - (t[stretch[0]] + t[stretch[-1]]) / 2))]


def above(p):
    """The number of values above each threshold."""
    return len(p) - np.searchsorted(np.sort(p), THRESHOLDS, side="right")


def index(threshold):
    (found,) = np.flatnonzero(np.float32(threshold) == THRESHOLDS)
    assert float(THRESHOLDS[found]) == threshold
    return found


# ---------------------------------------------------------------------------------------------------------------
# The YAML


def test_what_was_counted(run):
    metadata = run.result["metadata"]
    assert metadata["num_images"] == 24
    assert metadata["num_pixels"] == 24 * HEIGHT * WIDTH
    assert metadata["counted_with"]["batch_size"] == 5
    confidence = metadata["confidence"]
    assert (confidence["level"], confidence["blocks"], confidence["kind_of_blocks"]) == (0.95, 8, "stacks")


@pytest.mark.parametrize("c", [0, 1])
def test_the_threshold_is_the_best_of_all(run, c):
    output, curves = run.output[CLASSES[c]], run.curves[c]
    assert run.result["final_trained_prediction_thresholds"][CLASSES[c]] == output["x"]
    k = index(output["x"])
    assert k == curves.choose(*curves.counts)
    p, truth = run.p[..., c], run.truth[..., c]
    counts = confusion(p, truth, output["x"])
    assert counts == tuple(int(count[k]) for count in curves.counts)
    name = run.metric.partition("_at_")[0]
    assert output["metric"] == NUMBERS[name](*counts)
    assert output["fun"] == 1 - output["metric"]
    assert output["metric_at_half"] == NUMBERS[name](*confusion(p, truth, 0.5))
    if run.metric != "iou_score":
        assert NUMBERS["recall"](*counts) >= 0.7
    low, high = map(index, output["equally_good_thresholds"])
    assert low <= k <= high
    assert (output["success"], output["status"], output["warnings"]) == (True, 0, [])
    history = run.result["metadata"]["thresholds_training_history"][CLASSES[c]]
    assert len(history) == output["nfev"] > 3
    for n in range(output["nfev"]):
        threshold, metric = history[f"{n}_threshold_metric"]
        assert metric == NUMBERS[name](*confusion(p, truth, threshold))
        assert f"{n:3d}  threshold {threshold:.5f}  {run.metric} {metric:.6f}" in run.stdout
    assert history[f"{output['nfev'] - 1}_threshold_metric"] == [output["x"], output["metric"]]


@pytest.fixture(scope="module")
def bootstraps(run):
    """For each class, 10,000 replicates: the threshold that each chooses, and metrics there and at other thresholds."""
    found = []
    for c, curves in enumerate(run.curves):
        rng = np.random.default_rng(c)
        x, half = index(run.output[CLASSES[c]]["x"]), index(0.5)
        coarse = np.unique([*range(0, len(THRESHOLDS), 64), x, half])  # replicates may choose among these
        few = Curves.__new__(Curves)
        vars(few).update(vars(curves), of_stacks=curves.of_stacks[..., coarse])
        replicates = []
        for _ in range(10_000):
            drawn = few.drawn(np.bincount(rng.integers(0, 8, 8), minlength=8))
            values = few.value(*drawn)
            allowed = (
                values if run.metric == "iou_score" else np.where(drawn[0] / (drawn[0] + drawn[2]) >= 0.7, values, -1)
            )
            best = int(np.argmax(allowed))
            at_x, at_half = values[np.searchsorted(coarse, [x, half])]
            replicates.append(
                (THRESHOLDS[coarse[best]], at_x, at_half, values[best], curves.values[coarse[best]], values)
            )
        found.append([np.array(column) for column in zip(*replicates, strict=True)])
    return found


def interval(replicates):
    """95 % interval for eight blocks, widened as in Hesterberg (2015): t with 7 degrees of freedom, and sqrt(8 / 7)."""
    tail = stats.norm.cdf(-np.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    return np.quantile(replicates, [tail, 1 - tail])


def assert_alike(limits, truth):
    """Limits from two bootstraps with different seeds may differ by 8 % of the interval's width."""
    width = truth[1] - truth[0]
    assert width > 0
    assert limits == pytest.approx(truth, abs=0.08 * width)
    assert limits[0] < limits[1]


@pytest.mark.parametrize("c", [0, 1])
def test_intervals_and_what_to_expect(run, bootstraps, c):
    output = run.output[CLASSES[c]]
    chosen, at_x, at_half, at_own, full_at_own, _ = bootstraps[c]
    assert output["blocks"] == 8
    assert output["why_no_interval"] is None
    assert_alike(output["x_confidence_interval"], interval(chosen))
    optimism = max(np.mean(at_own - full_at_own - (at_x - output["metric"])), 0)
    expected = output["metric"] - optimism
    assert output["expected_metric"] == pytest.approx(expected, abs=0.25 * optimism + 1e-3)
    # Student's t on the logit scale. The spread is that of a replicate's best metric around that of all images there.
    reach = stats.t.ppf(0.975, 7) * np.std(logit(at_own) - logit(full_at_own)) * np.sqrt(8 / 7)
    limits = expit(logit(expected) - reach), expit(logit(output["metric"]) + reach)
    assert_alike(output["metric_confidence_interval"], limits)
    for limits, value in (("metric_confidence_interval", "metric"), ("x_confidence_interval", "x")):
        assert output[limits][0] <= output[value] <= output[limits][1]
    half = index(0.5)
    reached = run.metric == "iou_score" or run.curves[c].counts[0][half] / run.curves[c].positives.sum() >= 0.7
    if reached:
        assert output["gain"] == output["metric"] - output["metric_at_half"]
        assert_alike(output["gain_confidence_interval"], interval(at_x - at_half) - [optimism, 0])
    else:
        assert output["gain"] is None and output["gain_confidence_interval"] is None


@pytest.mark.parametrize("c", [0, 1])
def test_guaranteed_recall(run, c):
    """Conformal risk control, over the stacks, on every 64th threshold."""
    guaranteed = run.output[CLASSES[c]]["guaranteed_recall"]
    if run.metric == "iou_score":
        assert guaranteed is None
        return
    curves = run.curves[c]
    missed = (1 - curves.of_stacks[:, 0, ::64] / curves.positives[:, None]).sum(axis=0)
    k = 64 * np.flatnonzero((missed + 1) / 9 <= 0.3 + 1e-12)[-1]
    assert guaranteed["threshold"] == float(THRESHOLDS[k])
    assert (guaranteed["level"], guaranteed["blocks"]) == (0.7, 8)
    counts = confusion(run.p[..., c], run.truth[..., c], THRESHOLDS[k])
    assert guaranteed["precision"] == NUMBERS["precision"](*counts)
    assert f"threshold {THRESHOLDS[k]:.5f} guarantees recall 0.7" in run.stdout


# ---------------------------------------------------------------------------------------------------------------
# The table


def test_the_table(run):
    lines = run.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class ") and "folder" in line)
    cells = [re.split(r" {2,}", line) for line in lines[first : first + 3]]
    assert cells[0] == [
        *("class", "folder", "threshold", "95 % interval", run.metric, "95 % interval", "expected", "at 0.5", "gain")
    ]
    for c, row in enumerate(cells[1:]):
        output = run.output[CLASSES[c]]
        gain = "-" if output["gain"] is None else f"{output['gain']:+.4f}"
        if output["gain"] is not None and output["gain_confidence_interval"][0] <= 0:
            gain += " (none)"
        assert row == [
            CLASSES[c],
            f"class_{c}",
            f"{output['x']:.5f}",
            " to ".join(f"{limit:.5f}" for limit in output["x_confidence_interval"]),
            f"{output['metric']:.4f}",
            " to ".join(f"{limit:.4f}" for limit in output["metric_confidence_interval"]),
            f"{output['expected_metric']:.4f}",
            f"{output['metric_at_half']:.4f}",
            gain,
        ]
    assert any("8 stacks" in line for line in lines[:first])


# ---------------------------------------------------------------------------------------------------------------
# The curves


@pytest.mark.parametrize("c", [0, 1])
def test_the_curves_as_data(run, bootstraps, c):
    rows = [row for row in run.rows if row["class"] == CLASSES[c]]
    output = run.output[CLASSES[c]]
    assert list(rows[0]) == ["class", "threshold", "tp", "fp", "fn", "tn", *NUMBERS, "band_low", "band_high"]
    thresholds = np.array([float(row["threshold"]) for row in rows], np.float32)
    assert set(THRESHOLDS[::128]) | {np.float32(output["x"])} == set(thresholds)
    assert (np.diff(thresholds) > 0).all()
    k = int(np.searchsorted(thresholds, np.float32(output["x"])))
    for row in [*rows[::40], rows[k]]:
        counts = confusion(run.p[..., c], run.truth[..., c], np.float32(float(row["threshold"])))
        assert tuple(int(row[name]) for name in ("tp", "fp", "fn", "tn")) == counts
        for name, number in NUMBERS.items():
            assert float(row[name]) == pytest.approx(number(*counts), abs=1e-11)
    band = [float(rows[k][name]) for name in ("band_low", "band_high")]
    assert band == pytest.approx(output["metric_confidence_interval"], abs=1e-11)
    replicates = bootstraps[c][-1]  # (replicates, every 64th threshold, and two more)
    coarse = np.unique([*range(0, len(THRESHOLDS), 64), index(output["x"]), index(0.5)])
    checked = 0
    for row in rows[100:-100:40]:
        truth = interval(replicates[:, np.searchsorted(coarse, index(float(np.float32(row["threshold"]))))])
        if truth[1] - truth[0] > 1e-3:
            assert_alike((float(row["band_low"]), float(row["band_high"])), truth)
            checked += 1
    assert checked >= 3


# ---------------------------------------------------------------------------------------------------------------
# The figures


@pytest.mark.parametrize("c", [0, 1])
def test_the_figure_of_the_curves(run, c):
    axes = run.figure.axes[c]
    output, curves = run.output[CLASSES[c]], run.curves[c]
    drawn = {artist.get_label(): artist for artist in (*axes.lines, *axes.collections, *axes.patches)}
    tp, fp, fn, _ = curves.counts
    truths = {
        run.metric: curves.values,
        "precision": np.divide(tp, tp + fp, out=np.zeros(len(tp)), where=tp + fp > 0),
        "recall": tp / (tp + fn),
    }
    for label, truth in truths.items():
        x, y = drawn[label].get_data()
        at = [np.searchsorted(x, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
        for i in at:  # the curve lies between neighbouring drawn points
            expected = truth[np.searchsorted(THRESHOLDS, x[i])]
            assert min(y[i - 2 : i + 3]) - 0.002 <= expected <= max(y[i - 2 : i + 3]) + 0.002
    assert drawn["trained threshold"].get_xdata()[0] == output["x"]
    assert drawn["threshold 0.5"].get_xdata()[0] == 0.5
    span = drawn["its 95 % interval"].get_extents().transformed(axes.transData.inverted())
    assert [span.x0, span.x1] == pytest.approx(output["x_confidence_interval"], abs=1e-6)
    outline = drawn["its 95 % confidence band"].get_paths()[0].vertices
    band = [row for row in run.rows if row["class"] == CLASSES[c]][200:700:100]
    for row in band:
        y = outline[np.isclose(outline[:, 0], float(row["threshold"]), atol=1e-7), 1]
        assert (y.min(), y.max()) == pytest.approx((float(row["band_low"]), float(row["band_high"])), abs=1e-4)
    (point,) = (line for line in axes.lines if line.get_marker() == "o")
    assert [value[0] for value in map(np.atleast_1d, point.get_data())] == [output["x"], output["metric"]]
    assert axes.get_ylabel() == run.metric
    assert axes.get_xlabel() == "threshold"

    texts = "\n".join(text.get_text() for text in axes.texts)
    x, metric = output["x_confidence_interval"], output["metric_confidence_interval"]
    assert f"{CLASSES[c]} (class_{c})" in texts
    assert f"threshold {output['x']:.5f} [{x[0]:.5f}, {x[1]:.5f}]" in texts
    assert f"{run.metric} {output['metric']:.4f} [{metric[0]:.4f}, {metric[1]:.4f}]" in texts
    if output["gain"] is None:
        assert "gain unknown" in texts
    else:
        gain = output["gain_confidence_interval"]
        assert f"gain {output['gain']:+.4f} [{gain[0]:+.4f}, {gain[1]:+.4f}]" in texts
    assert f"over {output['metric_at_half']:.4f} at 0.5" in texts
    assert f"{output['expected_metric']:.4f} expected" in texts
    assert f"{np.count_nonzero(run.truth[..., c]):,} positive" in texts
    title, note = sorted((text.get_text() for text in run.figure.texts), key=lambda text: MODEL_ID not in text)
    assert title == f"{MODEL_ID} on dataset-tiny/validation (24 images)"
    assert "8 stacks" in note.replace("\n", " ")


def test_the_slices_are_drawn_at_the_trained_thresholds(run):
    thresholds = np.array([run.output[name]["x"] for name in CLASSES], np.float32)
    assert len(run.slices) == 6
    assert len({shown.name for shown in run.slices}) == 6
    for shown in run.slices:
        i = run.names.index(shown.name)
        np.testing.assert_array_equal(shown.image, run.images[i])
        np.testing.assert_array_equal(shown.truth, run.truth[i])
        np.testing.assert_array_equal(shown.prediction, run.p[i] > thresholds)
        assert (shown.prediction != (run.p[i] > 0.5)).any()
