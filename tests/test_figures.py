"""The figures: everything is drawn at the right place, for any number of classes, any names and sizes."""

import csv
import io
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import figures
import models
from counts import THRESHOLDS
from results import ClassResult, curves_csv

T = THRESHOLDS.astype(np.float64)
ODD_NAMES = [
    r"fibre $\alpha",
    "$_{",
    "100%_{}",
    "crack\n\udcff\t",
    "Größe Ω",
    "裂纹",
    "a" * 300,
    "",
    "^\\",
    "$x$",
]


NOTE = "The intervals rest on 11 stacks and speak of further stacks of the same kind. " * 3


def index_of(threshold):
    return int(np.abs(T - threshold).argmin())


def bump(centre, width, height):
    return height * np.exp(-(((T - centre) / width) ** 2))


def result(name="class0", folder="class_0", centre=0.6, width=0.2, height=0.8, metric=None, x=None, **confidence):
    """A ClassResult whose metric is a bump, or the one given, with the threshold at its peak, or at x."""
    metric = bump(centre, width, height) if metric is None else metric
    index = int(np.argmax(metric)) if x is None else index_of(x)
    x, value, at_half = T[index], metric[index], metric[index_of(0.5)]
    at_blocks = metric[::64]
    pixels = np.full(len(T), 12345)
    curve = models.ClassCurve(
        tp=pixels, fp=pixels, fn=0 * pixels, tn=pixels, metric=metric, precision=T**0.5, recall=1 - T**3
    )
    trained = SimpleNamespace(index=index, x=float(x), metric=float(value), metric_at_half=float(at_half))
    values = {
        "x_interval": (0.95 * x, x + 0.02 * (1 - x)),
        "metric_interval": (0.9 * value, min(1.1 * value, 1)),
        "expected_metric": 0.97 * value,
        "gain": value - at_half,
        "gain_interval": (value - at_half - 0.01, value - at_half + 0.02),
        "band_low": 0.9 * at_blocks,
        "band_high": np.minimum(1.1 * at_blocks, 1),
    }
    return ClassResult(name, folder, trained, curve, SimpleNamespace(**{**values, **confidence}), None)


def draw(results, metric_name="iou_score", title="title"):
    return figures.draw_curves(results, metric_name, title, NOTE)


def decode(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def is_near(pixels, color):
    """Which of the pixels have a colour given as #RRGGBB, give or take antialiasing."""
    return np.abs(pixels - [int(color[i : i + 2], 16) for i in (1, 3, 5)]).sum(axis=1) < 30


def panels(results, metric_name="iou_score"):
    """The figure and its panels' axes, laid out as in the PNG."""
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        figure = figures.curves_figure(results, metric_name, "title", NOTE)
    return figure, figure.axes


def pixels_at(picture, figure, axes, x, y):
    """The 3 x 3 pixels of the decoded PNG around a point in the coordinates of the axes."""
    column, up = axes.transData.transform((x, y))
    row = len(picture) - up
    return picture[round(row) - 1 : round(row) + 2, round(column) - 1 : round(column) + 2].reshape(-1, 3)


def line(axes, label):
    return next(artist for artist in axes.lines if artist.get_label() == label)


# The curves


@pytest.mark.parametrize(
    ("classes", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (12, 3, 4), (14, 4, 4)]
)
def test_every_class_has_a_panel(classes, rows, columns):
    results = [result(f"class{i}", f"folder {i}", centre=(i + 1) / 15) for i in range(classes)]
    figure, axes = panels(results)
    boxes = [one.get_position() for one in axes]
    assert len(axes) == classes
    assert len({round(box.x0, 6) for box in boxes}) == columns
    assert len({round(box.y0, 6) for box in boxes}) == rows
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for i, (one, box) in enumerate(zip(axes, boxes, strict=True)):
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < 1 and box.y1 < 1
        assert line(one, "trained threshold").get_xdata()[0] == pytest.approx((i + 1) / 15, abs=1 / 65536)
    picture = decode(draw(results))
    assert np.abs(np.subtract(picture.shape[:2], (figure.bbox.height, figure.bbox.width))).max() <= 1


@pytest.mark.parametrize("classes", [1, 2, 3, 12])
def test_text_is_inside_the_page_and_does_not_overlap(classes):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    # Long names everywhere, and the widest tick labels.
    results = [result("class10", "m" * 80, height=0.0007)] * classes
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.curves_figure(results, "binary_accuracy_tfkeras", "long title " * 40, NOTE * 3)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(texts) > 15 * classes
    page = figure.bbox
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1, text
        assert not [texts[k] for k in range(i) if box.overlaps(boxes[k])], text


def test_a_narrow_peak_is_drawn_at_its_place():
    # Spikes one threshold wide, which would be lost if points were left out to thin the curve.
    high, low = index_of(47001 / 65536), index_of(20001 / 65536)
    metric = np.full(len(T), 0.1)
    metric[high], metric[low] = 0.9, 0.7
    shown = result(metric=metric)
    figure, (axes,) = panels([shown])
    x, y = line(axes, "iou_score").get_data()
    assert y.max() == 0.9
    assert x[np.argmax(y)] == pytest.approx(47001 / 65536, abs=1e-3)
    assert y[np.abs(x - 20001 / 65536) < 1e-3].max() == 0.7
    assert len(x) < 5000

    picture = decode(draw([shown]))
    assert is_near(pixels_at(picture, figure, axes, 47001 / 65536, 0.9), figures.VERMILLION).all()
    assert is_near(pixels_at(picture, figure, axes, 20001 / 65536, 0.5), figures.BLUE).any()
    assert not is_near(pixels_at(picture, figure, axes, 20001 / 65536 + 0.02, 0.5), figures.BLUE).any()


@pytest.mark.parametrize("centre", [0.5, 1e-4])
def test_the_drawn_curve_is_within_a_column_of_the_true_one(centre):
    metric = np.random.default_rng(0).random(len(T))
    metric[index_of(centre)] = 1.1  # the trained threshold, which decides the kind of axis
    _, (axes,) = panels([result(metric=metric)])
    drawn_x, drawn_y = line(axes, "iou_score").get_data()
    x = np.log(T / (1 - T)) if "logit" in axes.get_xlabel() else T
    assert ("logit" in axes.get_xlabel()) == (centre < 0.02)
    column = np.ptp(axes.get_xlim()) / 400
    assert drawn_x[0] <= x[0] + column and (np.diff(drawn_x) >= 0).all() and len(drawn_x) < 5000
    seen = np.flatnonzero((x > axes.get_xlim()[0]) & (x < axes.get_xlim()[1]))
    order = seen[np.argsort(metric[seen])]
    for k in order[-50:]:  # peaks
        assert drawn_y[np.abs(drawn_x - x[k]) <= column].max() >= metric[k]
    for k in order[:50]:  # dips
        assert drawn_y[np.abs(drawn_x - x[k]) <= column].min() <= metric[k]


@pytest.mark.parametrize("x", [2.0**-40, 1e-9, 1e-5, 0.002, 0.998, 0.9999999, 1 - 2.0**-24])
def test_the_axis_reaches_as_far_as_a_threshold_close_to_an_end(x):
    logit = np.log(T / (1 - T))
    metric = 0.8 * np.exp(-(((logit - logit[index_of(x)]) / 0.3) ** 2))
    shown = result(metric=metric)
    figure, (axes,) = panels([shown])
    at = line(axes, "trained threshold").get_xdata()[0]
    column = axes.transData.transform((at, 0))[0]
    box = axes.get_window_extent()
    assert min(column - box.x0, box.x1 - column) > 5
    half = axes.transData.transform((line(axes, "threshold 0.5").get_xdata()[0], 0))[0]
    assert box.x0 < half < box.x1
    picture = decode(draw([shown]))
    assert is_near(pixels_at(picture, figure, axes, at, 0.8), figures.VERMILLION).all()
    assert "logit" in axes.get_xlabel()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(ticks) <= 8 and "0.5" in ticks
    assert np.log(np.array(ticks, float) / (1 - np.array(ticks, float))) == pytest.approx(list(axes.get_xticks()))


@pytest.mark.parametrize("height", [0.0004, 0.013, 0.15, 0.35, 0.93, 1.0])
def test_the_curve_of_a_low_metric_fills_its_panel(height):
    _, (axes,) = panels([result(height=height)])
    bottom, top = axes.get_ylim()
    assert (height - bottom) / (top - bottom) > 0.3
    assert top >= min(1.1 * height, 1)
    assert [float(label.get_text()) for label in axes.get_yticklabels()] == pytest.approx(list(axes.get_yticks()))


def test_the_axis_of_a_metric_that_is_always_high_starts_above_0():
    high = result(metric=0.97 + bump(0.4, 0.2, 0.02), metric_interval=(0.985, 0.995))
    _, (axes,) = panels([high], "binary_accuracy_sm")
    bottom, top = axes.get_ylim()
    assert 0.9 < bottom < 0.97
    assert top >= 1


def test_the_intervals_and_one_half_are_drawn():
    shown = result(x_interval=(0.3, 0.9))
    _, (axes,) = panels([shown])
    low, high = axes.patches[0].get_extents().transformed(axes.transData.inverted()).intervalx
    assert (low, high) == pytest.approx((0.3, 0.9))
    band = axes.collections[0].get_paths()[0].vertices
    at = len(T[::64]) // 2
    for y in (shown.confidence.band_low[at], shown.confidence.band_high[at]):
        assert np.isclose(band, (T[::64][at], y)).all(axis=1).any()
    assert line(axes, "threshold 0.5").get_xdata()[0] == 0.5
    for name in ("precision", "recall"):
        x, y = line(axes, name).get_data()
        assert np.allclose(y, np.interp(x, T, getattr(shown.curve, name)), atol=0.03)
    # An interval over the whole axis hides nothing.
    wide = result(x_interval=(T[0], T[-1]))
    figure, (axes,) = panels([wide])
    picture = decode(draw([wide]))
    assert is_near(pixels_at(picture, figure, axes, wide.trained.x, 0.8), figures.VERMILLION).all()
    assert is_near(pixels_at(picture, figure, axes, 0.4, wide.curve.metric[index_of(0.4)]), figures.BLUE).any()


def test_the_numbers_of_a_class_stand_above_its_panel():
    shown = result("class7", "cracks", x=0.61234, x_interval=(0.6, 0.65), metric_interval=(0.25, 0.7875))
    figure, (axes,) = panels([shown], "f1_score")
    shown_text = "\n".join(text.get_text() for text in axes.texts)
    trained = shown.trained
    for part in [
        "class7 (cracks)",
        "0.61234 [0.60000, 0.65000]",
        f"f1_score {trained.metric:.4f} [0.2500, 0.7875]",
        f"{0.97 * trained.metric:.4f} expected on new images",
        f"gain {trained.metric - trained.metric_at_half:+.4f} [",
        f"{trained.metric_at_half:.4f} at 0.5",
        "12,345 positives",
    ]:
        assert part in shown_text
    assert axes.get_ylabel() == "f1_score" and axes.get_xlabel() == "threshold"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"f1_score", "precision", "recall", "trained threshold", "threshold 0.5"} < set(legend)
    assert NOTE.split() == next(text for text in figure.texts if "stacks" in text.get_text()).get_text().split()


def test_without_an_interval_there_is_no_band():
    nothing = dict.fromkeys(["x_interval", "metric_interval", "expected_metric", "gain_interval", "band_low"])
    shown = result(**nothing)
    figure, (axes,) = panels([shown])
    assert not axes.patches and not axes.collections
    assert "[" not in "".join(text.get_text() for text in axes.texts)
    assert not any("95" in text.get_text() for text in figure.legends[0].get_texts())
    assert decode(draw([shown])).size


def test_without_an_interval_the_band_is_empty_in_the_curves_as_data():
    without = result(name="class1", metric_interval=None, band_low=None)
    rows = list(csv.DictReader(io.StringIO(curves_csv([result(), without]).decode())))
    assert all((row["band_low"] == row["band_high"] == "") == (row["class"] == "class1") for row in rows)
    assert not any(None in row or None in row.values() for row in rows)  # no field too many or too few


@pytest.mark.parametrize("metric_name", ["precision", "recall"])
def test_a_metric_is_not_drawn_twice(metric_name):
    figure, (axes,) = panels([result()], metric_name)
    assert [artist.get_label() for artist in axes.lines].count(metric_name) == 1
    assert line(axes, metric_name).get_linewidth() > 1.5


def test_names_are_drawn_literally():
    results = [result(f"class{i}", name) for i, name in enumerate(ODD_NAMES)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(results, title=r"$\frac{model}$ 裂纹 \udcff")
    _, axes = panels(results)
    titles = [one.texts[0].get_text() for one in axes]
    assert titles[0] == r"class0 (fibre $\alpha)" and titles[9] == "class9 ($x$)"
    assert titles[6].startswith("class6 (aaa") and titles[6].endswith("aaa)") and "…" in titles[6]
    assert not any(text.get_parse_math() for one in axes for text in one.texts)


def test_the_users_matplotlib_settings_have_no_effect_and_do_not_change():
    import matplotlib

    expected = draw([result()])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "font.family": "serif"}):
        before = dict(matplotlib.rcParams)
        assert draw([result()]) == expected
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys, figures; assert not [m for m in sys.modules if m.startswith('matplotlib')]\n"
        "import test_figures as t\n"
        "t.draw([t.result()])\n"
        "figures.draw_slices([t.marked()], ['class0'], 'title')\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": f"{here}:{here.parent}"})


# The slices


def tint(outcome, grey):
    """The colour of an outcome (0 hit, 1 miss, 2 false alarm) over a grey level of the image."""
    color, opacity = list(figures.OUTCOMES.values())[outcome]
    return opacity * np.array(color) + (1 - opacity) * grey


def positions(picture, color):
    """Rows and columns of the pixels of a colour, give or take the palette's step of grey."""
    return np.argwhere((np.abs(picture - color) <= 2).all(axis=-1))


def marked(size=(256, 256), grey=12, name="slice_0"):
    """A hit of 20 x 10 pixels, a miss of 5 x 10 right of it, a false alarm of 20 x 3 below it."""
    truth, prediction = np.zeros((*size, 1), bool), np.zeros((*size, 1), bool)
    truth[50:70, 30:40] = prediction[50:70, 30:40] = True
    truth[50:55, 40:50] = True
    prediction[70:90, 30:33] = True
    return figures.Slice(name, np.full(size, grey, np.uint8), truth, prediction)


def test_hits_misses_and_false_alarms_are_drawn_at_their_places():
    picture = decode(figures.draw_slices([marked()], ["class0"], "title"))
    hits, misses, false_alarms = (positions(picture, tint(i, 12)) for i in range(3))
    assert (len(hits), len(misses), len(false_alarms)) == (20 * 10, 5 * 10, 20 * 3)
    corner = hits.min(axis=0)
    assert (misses.min(axis=0) - corner).tolist() == [0, 10]
    assert (false_alarms.min(axis=0) - corner).tolist() == [20, 0]
    slice_corner = corner - (50, 30)
    assert np.abs(picture[tuple(slice_corner)] - 12).max() <= 2
    assert (picture[tuple(slice_corner - 1)] == 255).all()


def test_rows_are_classes_and_columns_are_slices():
    shape = 100, 80
    slices = []
    for i in range(3):
        mask = np.zeros((*shape, 2), bool)
        mask[:, :, i % 2] = True
        slices.append(figures.Slice(f"slice {i}", np.full(shape, 40 * i, np.uint8), mask, np.ones_like(mask)))
    picture = decode(figures.draw_slices(slices, ["a", "b"], "title"))
    means = []
    for i in range(3):
        for outcome in (0, 2):
            found = positions(picture, tint(outcome, 40 * i))
            assert len(found) == 300 * 240  # enlarged three times
            means.append((i, outcome, *found.mean(axis=0)))
    row = {(i, outcome): y for i, outcome, y, _ in means}
    column = {(i, outcome): x for i, outcome, _, x in means}
    assert row[0, 0] == row[1, 2] == row[2, 0] < row[0, 2] == row[1, 0] == row[2, 2]
    assert column[0, 0] == column[0, 2] < column[1, 0] == column[1, 2] < column[2, 0] == column[2, 2]


def test_the_grey_values_of_the_image_are_visible_under_the_colours():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    empty = np.zeros((256, 256, 1), bool)
    plain = decode(figures.draw_slices([figures.Slice("s", ramp, empty, empty)], ["a"], "title"))
    found = next(
        plain[-9, left : left + 256]
        for left in range(20)
        if np.abs(plain[-9, left : left + 256, 0] - ramp[0]).max() < 5
    )
    assert (found.min(axis=1) == found.max(axis=1)).all()
    covered = decode(figures.draw_slices([figures.Slice("s", ramp, ~empty, ~empty)], ["a"], "title"))
    left = next(i for i in range(20) if (covered[-9, i] != 255).any())
    assert (np.diff(covered[-9, left : left + 256].sum(axis=1)) >= 0).all()
    assert np.ptp(covered[-9, left : left + 256].sum(axis=1)) > 100


def test_cracks_one_pixel_wide_have_no_gaps_in_large_slices():
    truth = np.zeros((2048, 2048, 1), bool)
    truth[777] = True
    truth[np.arange(2048), np.arange(2048)] = True
    truth[1500, 3] = True
    shown = figures.Slice("s", np.full((2048, 2048), 12, np.uint8), truth, np.zeros_like(truth))
    picture = decode(figures.draw_slices([shown], ["a"], "title"))
    found = positions(picture, tint(1, 12))
    top, left = found.min(axis=0)
    mask = np.zeros((342, 342), bool)
    mask[tuple((found - (top, left)).T)] = True
    assert mask[777 // 6].all() and mask.diagonal().all() and mask[1500 // 6, 0]
    assert len(found) == 342 + 342 - 1 + 1


@pytest.mark.parametrize("side", [768, 1152])
def test_a_cell_shows_its_most_frequent_outcome(side):
    truth, prediction = np.random.default_rng(side).random((2, side, side)) < 0.1
    shown = figures.Slice("s", np.full((side, side), 12, np.uint8), truth[..., None], prediction[..., None])
    picture = decode(figures.draw_slices([shown], ["a"], "title"))
    cells = [block.reshape(384, side // 384, 384, side // 384).sum(axis=(1, 3)) for block in
             (truth & prediction, truth & ~prediction, ~truth & prediction)]  # fmt: skip
    hits, misses, false_alarms = cells
    outcome = np.where(hits > np.maximum(misses, false_alarms), 0, np.where(misses >= false_alarms, 1, 2))
    outcome = np.where(sum(cells) > 0, outcome, 3)
    colors = np.stack([*(tint(i, 12) for i in range(3)), [12, 12, 12]])
    top, left = positions(picture, colors[0]).min(axis=0) - np.argwhere(outcome == 0).min(axis=0)
    panel = picture[top : top + 384, left : left + 384]
    assert np.abs(panel - colors[outcome]).max() <= 2


@pytest.mark.parametrize("side", [384, 512])
def test_twelve_classes_of_noisy_images_and_odd_names_stay_below_4_mb(side):
    rng = np.random.default_rng(0)
    masks = (rng.random((2, side // 32, side // 32, 12)) < 0.3).repeat(32, axis=1).repeat(32, axis=2)
    slices = [
        figures.Slice(name, rng.normal(128, 40, (side, side)).clip(0, 255).astype(np.uint8), *masks)
        for name in ["$", "裂纹.tif", "x" * 400, "a\nb", "\udcff", ""]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = figures.draw_slices(slices, [*ODD_NAMES, "k", "l"], "m" * 900)
    assert len(png) < 4_000_000
    assert decode(png).shape[1] > 6 * 190


def test_the_same_input_gives_the_same_bytes():
    assert draw([result()]) == draw([result()])
    assert figures.draw_slices([marked()], ["a"], "t") == figures.draw_slices([marked()], ["a"], "t")
    assert figures.draw_slices([marked()], ["a"], "t") != figures.draw_slices([marked(grey=99)], ["a"], "t")
