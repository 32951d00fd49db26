"""The numbers that a user reads, from small real runs, are compared once with an independent truth.

For the truth, Pillow reads the images, `predict` of tf.keras gives the probabilities, `p > t` the counts, and a plain
bootstrap the intervals. The metrics are written out here, and the best thresholds are found by trying all.
"""

import csv
import dataclasses
import re
import shutil
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import MODEL, SPLIT, arguments, assert_done, predict, run_here
from PIL import Image
from scipy import stats
from scipy.special import expit, logit

import figures
from counts import HALF, THRESHOLDS

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
    above = p > np.float32(threshold)
    return tuple(int(pixels.sum()) for pixels in (above & truth, above & ~truth, ~above & truth, ~above & ~truth))


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
        waves = [np.sin(x / rng.uniform(4, 12) + y / rng.uniform(4, 12)) for _ in range(number)]
        images = 120 + 80 * np.stack(waves) + rng.normal(0, 20, (number, HEIGHT, WIDTH))
        images = images.clip(0, 255).astype(np.uint8)
        p = predict(tiny_network, images, batch_size=5)
        # Masks that agree with the network on some blocks more than on others, so that intervals have a width.
        level, spread = np.quantile(p, [0.75, 0.4], axis=(0, 1, 2)).diagonal(), p.std(axis=(0, 1, 2))
        trust = rng.uniform(0.3, 1.5, number)[:, None, None, None]
        # The first stacks have more pixels of the classes than the last.
        shift = rng.uniform(-0.4, 0.4, number) + np.repeat(np.linspace(1, -0.8, len(STACKS)), 3)
        masks = p + spread * (rng.normal(0, 1, p.shape) / trust + shift[:, None, None, None]) > level
        for i in range(number):
            pictures = {"images": images[i], "masks/class_0": 255 * masks[i, ..., 0].astype(np.uint8)}
            for subfolder, pixels in {**pictures, "masks/class_1": masks[i, ..., 1]}.items():
                (split / subfolder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(split / subfolder / f"{STACKS[i // 3]}-{i % 3}.png")
        dataset_config = {"target_size": [96, 64], "dataset_split": {"validation": STACKS}}
        (split.parent / "config.yaml").write_text(yaml.safe_dump({"dataset_config": dataset_config}))

    return make_once("truth", fill) / "bucket"


@pytest.fixture(scope="module", params=["iou_score", "precision_at_recall_0.7"])
def run(request, bucket_template, tiny_network, tmp_path_factory):
    """What a run gives to the user, and what is needed to compute the truth."""
    folder = tmp_path_factory.mktemp("run")
    bucket = Path(shutil.copytree(bucket_template, folder / "bucket"))
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves_figure", "draw_slices"):
            patch.setattr(figures, name, recording(drawn, name, getattr(figures, name)))
        process = run_here(*arguments("bucket", batch_size=5, optimizing_class_metric=request.param), cwd=folder)
    assert_done(process)
    (path,) = (bucket / MODEL).glob("model_thresholds_*.yaml")
    result = yaml.safe_load(path.read_text())
    tables = [path.with_name(f"{path.stem}_{name}.csv").read_text() for name in ("curves", "stacks")]
    rows, stacks = (list(csv.DictReader(table.splitlines())) for table in tables)
    split = bucket / SPLIT
    names = sorted(path.name for path in (split / "images").iterdir())
    images = np.stack([np.asarray(Image.open(split / "images" / name)) for name in names])
    p = predict(tiny_network, images, 5)
    masks = [[Image.open(split / folder / name) for name in names] for folder in ("masks/class_0", "masks/class_1")]
    truth = np.stack([[np.asarray(mask) > 0 for mask in of_class] for of_class in masks], axis=-1)
    assert 0.05 < truth.mean() < 0.95
    return SimpleNamespace(
        metric=request.param,
        result=result,
        output=result["metadata"]["thresholds_training_output"],
        rows=rows,
        stacks=stacks,
        stdout=process.stdout,
        figure=drawn["curves_figure"][1],
        slices=drawn["draw_slices"][0][:2],
        names=names,
        images=images,
        p=p,
        truth=truth,
        curves=[count_by_sorting(p[..., c], truth[..., c], request.param) for c in range(2)],
    )


def recording(drawn, name, function):
    def call(*given):
        value = function(*given)
        drawn[name] = given, value
        return value

    return call


@dataclasses.dataclass
class Curves:
    """Counts of one class at some thresholds, for each stack."""

    metric: str
    thresholds: np.ndarray  # (T,)
    of_stacks: np.ndarray  # (stacks, 2, T): tp, fp
    positives: np.ndarray  # (stacks,)
    negatives: np.ndarray

    def drawn(self, weights):
        """tp, fp, fn, tn of a replicate or several; `weights`, (..., stacks), says how often each stack was drawn."""
        tp, fp = np.moveaxis(np.tensordot(weights, self.of_stacks, 1), -2, 0)
        return tp, fp, (weights @ self.positives)[..., None] - tp, (weights @ self.negatives)[..., None] - fp

    @cached_property
    def counts(self):
        return self.drawn(np.ones(len(STACKS)))

    @cached_property
    def values(self):
        return self.value(*self.counts)

    @cached_property
    def worth(self):
        """How many equal stacks these are worth (Kish)."""
        return self.positives.sum() ** 2 / (self.positives.astype(float) ** 2).sum()

    def value(self, tp, fp, fn, tn):
        if self.metric == "iou_score":
            return tp / (tp + fp + fn)
        return np.divide(tp, tp + fp, out=np.zeros(tp.shape), where=tp + fp > 0)  # precision

    def allowed(self, tp, fp, fn, tn):
        """The metric where it may be chosen, else -1."""
        values = self.value(tp, fp, fn, tn)
        return values if self.metric == "iou_score" else np.where(tp / (tp + fn) >= 0.7, values, -1)

    def choose(self, tp, fp, fn, tn):
        """The index of the best threshold: the middle of the widest stretch of best ones."""
        values = self.allowed(tp, fp, fn, tn)
        best = np.flatnonzero(values == values.max())
        stretches = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
        t = self.thresholds.astype(float)
        stretch = max(stretches, key=lambda s: t[s[-1]] - t[s[0]])
        return stretch[np.argmin(abs(t[stretch] - (t[stretch[0]] + t[stretch[-1]]) / 2))]

    def at(self, indices):
        return dataclasses.replace(self, thresholds=self.thresholds[indices], of_stacks=self.of_stacks[..., indices])


def count_by_sorting(p, truth, metric):
    p, truth = p.reshape(len(STACKS), -1), truth.reshape(len(STACKS), -1)
    counts = [[above_each(own[inside]), above_each(own[~inside])] for own, inside in zip(p, truth, strict=True)]
    positives = truth.sum(axis=1)
    return Curves(metric, THRESHOLDS, np.array(counts), positives, truth.shape[1] - positives)


def above_each(p):
    """The number of values above each threshold."""
    return len(p) - np.searchsorted(np.sort(p), THRESHOLDS, side="right")


def index(threshold):
    (found,) = np.flatnonzero(np.float32(threshold) == THRESHOLDS)
    assert float(THRESHOLDS[found]) == threshold
    return found


# ---------------------------------------------------------------------------------------------------------------
# The YAML


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
    assert (output["success"], output["status"], output["fun"]) == (True, 0, 1 - output["metric"])
    assert output["metric_at_half"] == NUMBERS[name](*confusion(p, truth, 0.5))
    if run.metric != "iou_score":
        assert NUMBERS["recall"](*counts) >= 0.7
    low, high = map(index, output["equally_good_thresholds"])
    assert low <= k <= high
    assert any("new images may miss the 0.7" in warning for warning in output["warnings"]) == ("_at_" in run.metric)


@pytest.fixture(scope="module")
def bootstraps(run):
    """For each class, 10,000 replicates: what each chooses, and its metrics there and at other thresholds."""
    found = []
    names = ("threshold", "own", "of_all", "recall", "recall_of_all", "at_x", "at_half", "values")
    for c, curves in enumerate(run.curves):
        x, half = index(run.output[CLASSES[c]]["x"]), index(0.5)
        points = np.unique([*range(0, len(THRESHOLDS), 64), x, half])  # replicates may choose among these
        few, replicates = curves.at(points), []
        recall_of_all = few.counts[0] / curves.positives.sum()
        for weights in np.random.default_rng(c).multinomial(8, np.full(8, 1 / 8), (20, 500)).astype(float):
            drawn = few.drawn(weights)
            values, best = few.value(*drawn), few.allowed(*drawn).argmax(axis=1)
            all_recalls = drawn[0] / (drawn[0] + drawn[2])
            own, recall = (of_each[np.arange(500), best] for of_each in (values, all_recalls))
            chosen = few.thresholds[best], own, few.values[best], recall, recall_of_all[best]
            replicates.append((*chosen, *values[:, np.searchsorted(points, [x, half])].T, values))
        columns = (np.concatenate(column) for column in zip(*replicates, strict=True))
        found.append(SimpleNamespace(points=points, **dict(zip(names, columns, strict=True))))
    return found


def interval(replicates, worth):
    """Percentiles for 95 %, widened as in Hesterberg (2015): t with k - 1 degrees of freedom, and sqrt(k / (k - 1))."""
    tail = stats.norm.cdf(-np.sqrt(worth / (worth - 1)) * stats.t.ppf(0.975, worth - 1))
    return np.quantile(replicates, [tail, 1 - tail])


def from_to(low, high, own, of_all, worth):
    """Limits that lie t with k - 1 degrees of freedom, times the spread of the replicates, beyond low and high."""
    reach = stats.t.ppf(0.975, worth - 1) * np.std(own - of_all) * np.sqrt(8 / 7)
    return np.array([low - reach, high + reach])


def assert_alike(limits, truth):
    """Limits from two bootstraps with different seeds may differ by 8 % of the interval's width."""
    width = truth[1] - truth[0]
    assert width > 0
    assert limits == pytest.approx(truth, abs=0.08 * width)
    assert limits[0] < limits[1]


@pytest.mark.parametrize("c", [0, 1])
def test_intervals_and_what_to_expect(run, bootstraps, c):
    output, drawn, curves = run.output[CLASSES[c]], bootstraps[c], run.curves[c]
    k = curves.worth
    assert (output["blocks"], output["why_no_interval"]) == (8, None)
    assert output["worth"] == pytest.approx(k) and 6 < k < 7.7
    assert_alike(output["x_confidence_interval"], interval(drawn.threshold, k))
    optimism = max(np.mean(drawn.own - drawn.of_all - (drawn.at_x - output["metric"])), 0)
    expected = output["metric"] - optimism
    assert output["expected_metric"] == pytest.approx(expected, abs=0.25 * optimism + 1e-3)
    # On the logit scale. The spread is that of a replicate's best metric around that of all images there.
    limits = from_to(logit(expected), logit(output["metric"]), logit(drawn.own), logit(drawn.of_all), k)
    assert_alike(output["metric_confidence_interval"], expit(limits))
    half = index(0.5)
    if run.metric == "iou_score" or curves.counts[0][half] / curves.positives.sum() >= 0.7:
        gain = output["metric"] - output["metric_at_half"]
        assert output["gain"] == gain
        pairs = drawn.own - drawn.at_half, drawn.of_all - output["metric_at_half"]
        assert_alike(output["gain_confidence_interval"], from_to(gain - optimism, gain, *pairs, k))
        low, high = output["gain_confidence_interval"]
        assert output["gain_unclear"] == (low <= 0 <= high)
    else:
        assert output["gain"] is None and output["gain_confidence_interval"] is None


@pytest.mark.parametrize("c", [0, 1])
def test_the_level_of_a_constraint_and_guaranteed_recall(run, bootstraps, c):
    output, curves, drawn = run.output[CLASSES[c]], run.curves[c], bootstraps[c]
    guaranteed = output["guaranteed_recall"]
    if run.metric == "iou_score":
        assert guaranteed is None and output["constraint_value"] is None
        return
    recall = curves.counts[0][index(output["x"])] / curves.positives.sum()
    assert output["constraint_value"] == recall >= 0.7
    limits = from_to(logit(recall), logit(recall), logit(drawn.recall), logit(drawn.recall_of_all), curves.worth)
    assert_alike(output["constraint_confidence_interval"], expit(limits))
    assert (guaranteed["level"], guaranteed["blocks"]) == (0.7, 8)
    counts = confusion(run.p[..., c], run.truth[..., c], guaranteed["threshold"])
    for name in ("precision", "recall"):
        assert guaranteed[name] == NUMBERS[name](*counts)
    assert f"threshold {guaranteed['threshold']:.5f} guarantees recall 0.7" in run.stdout


@pytest.mark.parametrize("c", [0, 1])
def test_the_stacks(run, c):
    """Blocks are counted at every 64th threshold, so at x and 0.5 their metrics are near the truth."""
    rows = [row for row in run.stacks if row["class"] == CLASSES[c]]
    metrics = [float(row["metric"]) for row in rows]
    assert metrics == sorted(metrics) and sorted(row["stack"] for row in rows) == STACKS
    x, half = index(run.output[CLASSES[c]]["x"]), index(0.5)
    points = np.unique([*range(0, len(THRESHOLDS), 64), x, half])
    few = run.curves[c].at(points)
    for row in rows:
        own = np.eye(8)[STACKS.index(row["stack"])]
        assert (row["folder"], int(row["images"])) == (f"class_{c}", 3)
        assert int(row["pixels"]) == own @ few.positives
        at_x, at_half = few.value(*few.drawn(own))[np.searchsorted(points, [x, half])]
        assert [float(row["metric"]), float(row["metric_at_half"])] == pytest.approx([at_x, at_half], abs=2e-3)


def assert_shows(text, *values):
    """The numbers of a text are these values, as rounded as they are written."""
    numbers = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    values = [value for value in values if value is not None]
    assert len(numbers) == len(values), text
    for number, value in zip(numbers, values, strict=True):
        step = abs(float(number)) / 100 if "e" in number else 10.0 ** -len(number.partition(".")[2])
        assert float(number.replace(",", "")) == pytest.approx(value, abs=0.51 * step), (text, value)


def test_the_table(run):
    lines = run.stdout.splitlines()
    assert any("8 stacks" in line for line in lines)
    for c, name in enumerate(CLASSES):
        output = run.output[name]
        (first,) = (i for i, line in enumerate(lines) if line.startswith(f"{name}  "))
        values, limits = lines[first].removeprefix(name), lines[first + 1].removeprefix(f"(class_{c})")
        assert lines[first + 1] != limits
        assert_shows(values, *(output[key] for key in ("x", "metric", "expected_metric", "gain")))
        kinds = ("x_confidence_interval", "metric_confidence_interval", "next_stack_interval")
        assert_shows(limits, *(limit for kind in kinds for limit in output[kind]))
        assert ("unclear" in limits) == output["gain_unclear"]


@pytest.mark.parametrize("c", [0, 1])
def test_the_curves_as_data(run, bootstraps, c):
    rows = [row for row in run.rows if row["class"] == CLASSES[c]]
    for row in rows[::40]:
        counts = confusion(run.p[..., c], run.truth[..., c], np.float32(float(row["threshold"])))
        assert tuple(int(row[name]) for name in ("tp", "fp", "fn", "tn")) == counts
        for name, number in NUMBERS.items():
            assert float(row[name]) == pytest.approx(number(*counts), abs=1e-11)
    checked = 0
    for row in rows[100:-100:40]:
        column = np.searchsorted(bootstraps[c].points, index(float(np.float32(row["threshold"]))))
        truth = interval(bootstraps[c].values[:, column], run.curves[c].worth)
        if truth[1] - truth[0] > 1e-3:
            assert_alike((float(row["band_low"]), float(row["band_high"])), truth)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("c", [0, 1])
def test_the_figure_of_the_curves(run, c):
    axes = run.figure.axes[c]
    output, curves = run.output[CLASSES[c]], run.curves[c]
    drawn = {artist.get_label(): artist for artist in axes.lines}
    tp, fp, fn, _ = curves.counts
    label = axes.get_ylabel().removesuffix(" (another scale)")
    assert label == {"iou_score": "IoU"}.get(run.metric, "precision")
    truths = {
        label: curves.values,
        "precision": np.divide(tp, tp + fp, out=np.zeros(len(tp)), where=tp + fp > 0),
        "recall": tp / (tp + fn),
    }
    for name, truth in truths.items():
        x, y = drawn[name].get_data()
        at = [np.searchsorted(x, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
        for i in at:  # the curve lies between neighbouring drawn points
            expected = truth[np.searchsorted(THRESHOLDS, x[i])]
            assert min(y[i - 2 : i + 3]) - 0.002 <= expected <= max(y[i - 2 : i + 3]) + 0.002

    assert axes.get_title(loc="left") == f"{CLASSES[c]} (class_{c})"
    lines = [line for text in axes.texts for line in text.get_text().split("\n")]
    lines = {
        word: line for line in lines for word in ("threshold", label, "gain", "expected", "positives") if word in line
    }
    x, metric, gain = (output[f"{kind}_confidence_interval"] for kind in ("x", "metric", "gain"))
    assert_shows(lines["threshold"], output["x"], *x)
    assert_shows(lines[label], output["metric"], *metric, output["metric_at_half"], 0.5)
    if output["gain"] is not None:
        assert_shows(lines["gain"], output["gain"], *gain)
    assert_shows(lines["expected"], output["expected_metric"], *output["next_stack_interval"])
    assert int(lines["positives"].split()[0].replace(",", "")) == np.count_nonzero(run.truth[..., c])


def test_the_slices_are_drawn_at_the_trained_thresholds(run):
    thresholds = np.array([run.output[name]["x"] for name in CLASSES], np.float32)
    # For each class, the three slices with most of its pixels, each of another stack.
    pixels = run.truth.sum(axis=(1, 2))
    best = [[max(range(3 * s, 3 * s + 3), key=lambda i, c=c: pixels[i, c]) for s in range(8)] for c in (0, 1)]
    chosen = {run.names[i] for c in (0, 1) for i in sorted(best[c], key=lambda i, c=c: -pixels[i, c])[:3]}
    slices, indices = run.slices
    assert {shown.name for shown in slices} == chosen
    for shown in slices:
        i = run.names.index(shown.name)
        np.testing.assert_array_equal(shown.image, run.images[i])
        np.testing.assert_array_equal(shown.truth, run.truth[i])
        np.testing.assert_array_equal(shown.bins > indices, run.p[i] > thresholds)
        np.testing.assert_array_equal(shown.bins > HALF, run.p[i] > 0.5)
