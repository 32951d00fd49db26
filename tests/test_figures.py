"""The figures: everything is drawn at the right place, for any number of classes and any names."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import figures
import models
from confidence import Confidence, GuaranteedRecall, StackResult
from counts import HALF, THRESHOLDS, ShownSlice
from models import class_metric
from results import ClassResult

T = THRESHOLDS.astype(np.float64)
ODD_NAMES = [r"fibre $\alpha", "$_{", "100%_{}", "Größe Ω", "裂纹", "a" * 300, "^\\", "$x$"]
NOTE = "The 95 % intervals are computed from how 11 stacks differ. They hold for further stacks like these. " * 3


def index_of(threshold):
    return int(np.abs(T - threshold).argmin())


def bump(centre, width, height):
    return height * np.exp(-(((T - centre) / width) ** 2))


def result(name="class0", folder="class_0", metric=None, x=None, guaranteed=None, stacks=(), warned=(), **confidence):
    """A ClassResult whose metric is the one given, else a bump at 0.6, with the threshold at its peak, or at x."""
    metric = bump(0.6, 0.2, 0.8) if metric is None else metric
    index = int(np.argmax(metric)) if x is None else index_of(x)
    x, value, at_half = float(T[index]), float(metric[index]), float(metric[index_of(0.5)])
    pixels = np.full(len(T), 12345)
    curve = models.ClassCurve((pixels, pixels, 0 * pixels, pixels), metric)
    trained = models.TrainedThreshold(
        index=index, x=x, metric=value, metric_at_half=at_half, best_stretch=(x, x),
        outcome={}, history=[(x, value)], warnings=list(warned),
    )  # fmt: skip
    values = {
        **dict.fromkeys(["constraint_value", "why_no_next_stack", "why_no_interval"]),
        "blocks": 11,
        "worth": 11.0,
        "x_interval": (0.95 * x, x + 0.02 * (1 - x)),
        "metric_interval": (0.9 * value, min(1.1 * value, 1.0)),
        "expected_metric": 0.97 * value,
        "gain": value - at_half,
        "gain_interval": (value - at_half - 0.01, value - at_half + 0.02),
        "next_stack_interval": (0.6 * value, min(1.2 * value, 1.0)),
        "band_low": 0.9 * metric[::64],
        "band_high": np.minimum(1.1 * metric[::64], 1),
    }
    known = Confidence(**values | confidence)
    return ClassResult(name, folder, trained, curve, known, guaranteed, list(stacks), "stacks")


UNKNOWN = "x_interval metric_interval expected_metric gain_interval next_stack_interval band_low band_high"
NOTHING = dict.fromkeys(UNKNOWN.split()) | {"why_no_interval": "too few stacks", "why_no_next_stack": "these are runs"}


def stack(name, own_x, own_metric, x_without=0.6, metric_without=0.8):
    return StackResult(name, 5, 1000, 0.9 * own_metric, 0.5, own_x, own_metric, x_without, metric_without)


def decode(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and image.info.get("dpi", (300, 300)) == pytest.approx((300, 300), abs=0.1)
    return np.asarray(image.convert("RGB")).astype(int)


def panels(results, metric_name="iou_score", title="title"):
    """The figure and its panels' axes, laid out as in the PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(figures.STYLE):
        figure = figures.curves_figure(results, class_metric(metric_name), title, NOTE)
        FigureCanvasAgg(figure).draw()
    return figure, figure.axes


def line(axes, label):
    return next(artist for artist in axes.lines if artist.get_label() == label)


# The curves


@pytest.mark.parametrize(("classes", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (12, 3, 4)])
def test_every_class_has_a_panel_and_no_text_overlaps_another_or_the_edge(classes, rows, columns):
    from matplotlib.text import Text

    # Long names everywhere, the widest tick labels, and every entry of the legend.
    guaranteed = GuaranteedRecall(0.95, 30, None, 0.1, 0.2, 0.98)
    unclear = {"gain_interval": (-0.00029, 0.00071), "worth": 4.6}
    metric = bump(0.6, 0.2, 0.0007)
    results = [result("class10", "m" * 80, metric, None, guaranteed, [stack("a", 0.5, 0.0006)], **unclear)] * classes
    figure, axes = panels(results, "precision_at_recall_0.95", "long title " * 40)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    places = [one.get_position() for one in axes]
    assert len(places) == classes
    assert len({round(place.x0, 6) for place in places}) == columns
    assert len({round(place.y0, 6) for place in places}) == rows
    assert len(texts) > 15 * classes
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not [texts[k] for k in range(i) if box.overlaps(boxes[k])], text


@pytest.mark.parametrize("x", [2.0**-40, 0.002, 1 - 2.0**-24])
def test_the_axis_reaches_as_far_as_a_threshold_close_to_an_end(x):
    figure, (axes,) = panels([result(x=x)])
    box = axes.get_window_extent()
    columns = [axes.transData.transform((at, 0))[0] for at in (T[index_of(x)], 0.5)]
    assert all(box.x0 + 5 < column < box.x1 - 5 for column in columns)
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(ticks) <= 8 and "0.5" in ticks and "logit" in axes.get_xlabel()
    numbers = [float(tick.replace("\N{MINUS SIGN}", "-")) for tick in ticks]
    assert numbers == pytest.approx(list(axes.get_xticks()), rel=1e-9)


def test_panels_have_the_same_vertical_axis_except_where_a_curve_would_be_flat():
    heights = 0.5, 0.93, 0.01, 0.0004
    _, axes = panels([result(metric=bump(0.6, 0.2, height)) for height in heights])
    _, low = panels([result(metric=bump(0.6, 0.2, height)) for height in (0.05, 0.1)])
    assert axes[0].get_ylim() == axes[1].get_ylim() and low[0].get_ylim() == low[1].get_ylim()
    assert [one.get_ylabel() for one in axes] == ["IoU", "IoU", "IoU (another scale)", "IoU (another scale)"]
    for one, height in zip(axes, heights, strict=True):
        bottom, top = one.get_ylim()
        assert (height - bottom) / (top - bottom) > 0.3 and top >= min(1.1 * height, 1)
        assert [float(text.get_text()) for text in one.get_yticklabels()] == pytest.approx(list(one.get_yticks()))


def test_a_level_a_guarantee_the_next_stack_and_a_narrow_peak_are_drawn():
    guaranteed = GuaranteedRecall(0.9, 11, None, 0.2, 0.5, 0.97)
    metric = np.where(np.arange(len(T)) == index_of(0.61) + 1, 0.9, 0.4)  # a peak of one threshold
    known = {"guaranteed": guaranteed, "stacks": [stack("S", 0.3, 0.7)], "next_stack_interval": (0.35, 0.95)}
    shown = result("class7", "cracks", metric, gain=None, **known)
    figure, (axes,) = panels([shown], "precision_at_recall_0.9")
    assert [shown.trained.x, 0.9] in line(axes, "precision").get_xydata().tolist()
    assert line(axes, "recall asked for").get_ydata()[0] == 0.9
    assert line(axes, "recall 0.9 guaranteed").get_xdata()[0] == 0.2
    assert line(axes, "next stack (95 % range)").get_xydata().tolist() == [[shown.trained.x, y] for y in (0.35, 0.95)]
    assert line(axes, "stacks, each at its own best").get_xydata().tolist() == [[0.3, 0.7]]
    (span,) = axes.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx(shown.confidence.x_interval)
    assert [artist.get_label() for artist in axes.lines].count("precision") == 1  # the metric is not drawn twice
    assert any("0.5 does not reach" in text.get_text() for text in axes.texts)
    assert NOTE.split() == figure.get_suptitle().split()[1:]


def test_names_are_drawn_literally():
    results = [result(f"class{i}", name) for i, name in enumerate(ODD_NAMES)]
    _, axes = panels(results, title=r"$\frac{model}$ 裂纹")
    titles = [one.get_title(loc="left") for one in axes]
    assert titles[0] == r"class0 (fibre $\alpha)" and titles[7] == "class7 ($x$)"
    assert titles[3] == "class3 (Größe Ω)" and titles[4] == r"class4 (\u88c2\u7eb9)"  # which the font cannot draw
    assert titles[5].startswith("class5 (aaa") and titles[5].endswith("aaa)") and "…" in titles[5]


def draw_both():
    """Shapes and hashes of both figures by the ends of their names, and the number of warnings."""
    mask = np.ones((64, 64, 1), bool)
    counts = SimpleNamespace(shown=[slice_of("slice_0", mask, index_of(0.55) * mask)])
    files, problems = figures.draw([result()], counts, class_metric("iou_score"), "title", NOTE)
    return {name: (decode(data).shape, hashlib.sha256(data).hexdigest()) for name, data in files.items()}, len(problems)


def test_the_users_matplotlib_settings_change_nothing(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: black")
    path = f"{Path(__file__).parent}:{Path(figures.__file__).parent}"
    process = subprocess.run(
        [sys.executable, "-c", "import test_figures; print(test_figures.draw_both())"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "a_notebook"},
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.stderr) == (f"{draw_both()}\n", "")


def test_a_figure_that_cannot_be_drawn_costs_a_warning_only(monkeypatch):
    monkeypatch.setattr(figures, "draw_curves", None)
    files, number_of_problems = draw_both()
    assert (list(files), number_of_problems) == (["_slices.png"], 1)


# The slices


LOW, HIGH = index_of(0.3), index_of(0.7)  # trained thresholds
ABOVE = HIGH + 1  # the bin of pixels that are predicted, whatever the threshold


def tint(outcome, grey):
    """The colour of an outcome (0 hit, 1 miss, 2 false alarm) over a grey level of the image."""
    *color, opacity = list(figures.OUTCOMES.values())[outcome]
    return np.round(opacity * np.array(color) + (1 - opacity) * grey)


def positions(picture, color):
    """Rows and columns of the pixels of a colour."""
    return np.argwhere((picture == color).all(axis=-1))


def slice_of(name, truth, bins, grey=0):
    return ShownSlice(0, name, 0, 0, np.full(truth.shape[:2], grey, np.uint8), truth, bins)


def test_hits_misses_and_false_alarms_are_drawn_at_their_places():
    truth, prediction = np.zeros((2, 256, 256, 1), bool)
    truth[50:70, 30:40] = prediction[50:70, 30:40] = True  # hits
    truth[50:55, 40:50] = prediction[70:90, 30:33] = True  # misses right of them, false alarms below them
    greys = np.clip(2 * np.arange(256) - 200, 0, 255)  # of the columns; black where the marks are
    picture = decode(figures.draw_slices([slice_of("s", truth, ABOVE * prediction, greys)], [HIGH], ["a"], "title"))
    hits, misses, false_alarms = (positions(picture, tint(i, 0)) for i in range(3))
    assert (len(hits), len(misses), len(false_alarms)) == (20 * 10, 5 * 10, 20 * 3)
    corner = hits.min(axis=0)
    assert (misses.min(axis=0) - corner).tolist() == [0, 10]
    assert (false_alarms.min(axis=0) - corner).tolist() == [20, 0]
    top, left = corner - (50, 30)
    assert np.abs(picture[top, left : left + 256] - greys[:, None]).max() <= 2
    assert (picture[top - 1, left - 1] == 255).all()


def test_what_changed_from_one_half_is_marked_and_counted():
    truth, bins = np.zeros((2, 256, 256, 2), int)
    truth[50:60] = 1
    bins[50:60, 30:40] = LOW + 1  # hits at LOW, misses at 0.5
    bins[70:76, 30:40] = LOW + 1  # false alarms at LOW only
    bins[50:52, 40:50] = HALF + 1  # hits at 0.5, misses at HIGH
    bins[100:107, 30:40] = HALF + 1  # false alarms at 0.5, not at HIGH
    picture = decode(figures.draw_slices([slice_of("s", truth == 1, bins)], [LOW, HIGH], ["a", "b"], "title"))
    legend = 12 * 12
    sizes = {name: len(positions(picture, color[:3])) - legend for name, color in figures.CHANGES.items()}
    assert sizes == {"false alarm gone": 70, "new hit": 100, "new miss": 20, "new false alarm": 60}
    masks = truth[..., 0] == 1, bins[..., 0] > LOW, bins[..., 0] > HALF
    assert figures.change_text(*masks) == "hits +100, false alarms +60"
    assert figures.change_text(masks[0], masks[1], masks[1]) == "as at 0.5"


def test_rows_are_classes_and_columns_are_slices():
    masks = np.zeros((2, 90, 80, 2), bool)
    masks[0, :, :, 1] = masks[1, :, :, 0] = True
    slices = [slice_of(f"slice {i}", masks[i], ABOVE * masks[i], grey=255 * i) for i in range(2)]
    picture = decode(figures.draw_slices(slices, [HIGH, LOW], ["a", "b"], "title"))
    found = [positions(picture, tint(0, 255 * i)) for i in range(2)]
    assert [len(pixels) for pixels in found] == 2 * [270 * 240]  # enlarged three times
    (first_row, first_column), (second_row, second_column) = (pixels.mean(axis=0) for pixels in found)
    assert first_row > second_row and first_column < second_column


def test_slices_without_anything_to_see_are_left_out_where_there_are_others():
    nothing = np.zeros((64, 64, 1), bool)
    empty, masked = slice_of("a", nothing, 0 * nothing), slice_of("b", ~nothing, 0 * nothing)
    for shown, seen in (([empty, masked, masked], [masked]), ([empty, empty], [empty])):
        pictures = [figures.draw_slices(slices, [HIGH], ["class0"], "title") for slices in (shown, seen)]
        assert pictures[0] == pictures[1]


def test_cracks_one_pixel_wide_have_no_gaps_in_large_slices():
    truth = np.zeros((2048, 2048, 1), bool)
    truth[777] = truth[np.arange(2048), np.arange(2048)] = truth[1500, 3] = True
    picture = decode(figures.draw_slices([slice_of("s", truth, 0 * truth)], [HIGH], ["a"], "title"))
    found = positions(picture, tint(1, 0))
    expected = {(777 // 6, i) for i in range(342)} | {(i, i) for i in range(342)} | {(1500 // 6, 0)}
    assert set(map(tuple, (found - found.min(axis=0)).tolist())) == expected
