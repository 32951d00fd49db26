"""The two figures of a result: the metric over all thresholds, and slices with hits, misses and false alarms.

Matplotlib is imported where it is used, because the import takes a good part of a rerun's time. pyplot is not used: it
looks for a screen. The same input gives the same bytes.
"""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from counts import BLOCK_THRESHOLDS, THRESHOLDS
from results import threshold_text

# Colours of Okabe and Ito, which colour-blind people can distinguish. Lightness and line style differ too, for print
# without colour.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
OUTCOMES = {  # colour, and its opacity over the slice: higher for errors, which are often thin
    "hit: predicted and in the mask": ((86, 180, 233), 0.6),
    "miss: in the mask only": ((240, 228, 66), 0.8),
    "false alarm: predicted only": ((213, 94, 0), 0.8),
}

GREYS = 64  # times 4 is a palette of 256 colours: the greys, and the greys tinted by each of the three outcomes
SHOWN_PIXELS = 4_900_000  # at most, in all panels of slices together: keeps the file below 4 MB even for noisy images
PANEL_SIDE = 384  # pixels; a panel of slices is at most this wide and high

DPI = 150
STYLE = {
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along, so the figure is the same on every machine
    "font.size": 8,
    "text.usetex": False,
    "text.parse_math": False,  # the name of a folder may have a $ in it
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


class Slice(NamedTuple):
    """A slice as `draw_slices` shows it."""

    name: str
    image: np.ndarray  # (height, width) uint8
    truth: np.ndarray  # (height, width, classes) bool
    prediction: np.ndarray  # (height, width, classes) bool


def draw_curves(results, metric_name, title, note):
    """Draw the metric of every class over the threshold, with its confidence band, and the trained threshold.

    Parameters
    ----------
    results : list of results.ClassResult, at least one
        Each has a panel.
    metric_name : str
        For labels. Precision and recall are drawn too, but not twice if one of them is the metric.
    title : str
    note : str
        A text below the panels: what the band and the intervals rest on.

    Returns
    -------
    bytes
        A PNG.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        figure = curves_figure(results, metric_name, title, note)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box takes its place
            canvas.draw()
        return _png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def curves_figure(results, metric_name, title, note):
    """The matplotlib figure of `draw_curves`. Margins are set in inches: matplotlib's automatic ones are slow."""
    from matplotlib.figure import Figure

    columns = len(results) if len(results) <= 3 else min(4, math.ceil(math.sqrt(len(results))))
    rows = math.ceil(len(results) / columns)
    wide, high = (3.0, 2.1) if len(results) > 1 else (6.3, 3.2)
    left, right, above, below, head = 0.68, 0.12, 0.82, 0.45, 0.35
    width = columns * (left + wide + right)
    lines = _wrapped(note, 7.5, width - left - right)
    foot = (0.3 if columns > 2 else 0.48) + 0.14 * len(lines)
    height = head + rows * (above + high + below) + foot

    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.text(left / width, 1 - 0.12 / height, _shortened(title, 8, width - left - right), va="top")
    figure.text(left / width, 0.06 / height, "\n".join(lines), va="bottom", size=7.5)
    for i, result in enumerate(results):
        bottom = height - head - (i // columns + 1) * (above + high + below) + below
        axes = figure.add_axes(
            ((i % columns * (left + wide + right) + left) / width, bottom / height, wide / width, high / height)
        )
        _draw_panel(axes, result, metric_name, wide)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.14 * len(lines) / height),
        ncols=len(labels) if columns > 2 else 4,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.6,
    )
    return figure


def _draw_panel(axes, result, metric_name, wide):
    trained, curve, confidence = result.trained, result.curve, result.confidence
    # On a linear axis, a threshold close to 0 or 1 would lie on the frame: a logit axis spreads these thresholds.
    spread = not 0.02 <= trained.x <= 0.98
    position = _logit if spread else np.asarray
    ends = _logit_ends(trained.x, confidence.x_interval) if spread else (0.0, 1.0)

    def draw(values, **style):
        axes.plot(*_drawable(position(THRESHOLDS), values), **style)

    draw(curve.metric, color=BLUE, lw=1.8, zorder=3, label=metric_name)
    if confidence.band_low is not None:
        axes.fill_between(
            position(BLOCK_THRESHOLDS),
            confidence.band_low,
            confidence.band_high,
            color=BLUE,
            alpha=0.25,
            linewidth=0,
            label="its 95 % confidence band",
        )
    axes.axvline(position(trained.x), color=VERMILLION, linewidth=1.1, label="trained threshold")
    if confidence.x_interval is not None:
        axes.axvspan(
            *position(np.array(confidence.x_interval)),
            color=VERMILLION,
            alpha=0.15,
            linewidth=0,
            label="its 95 % interval",
        )
    axes.axvline(position(0.5), color="0.45", linewidth=0.9, linestyle=(0, (1, 1.5)), label="threshold 0.5")
    for name, color, style in (("precision", GREEN, (0, (5, 2))), ("recall", PURPLE, (0, (6, 1.5, 1, 1.5)))):
        if name != metric_name:
            draw(getattr(curve, name), color=color, lw=0.9, ls=style, label=name)
    axes.plot(position(trained.x), trained.metric, "o", color=VERMILLION, mec="black", mew=0.6, ms=4.5, zorder=4)

    margin = 0.02 * (ends[1] - ends[0])
    axes.set_xlim(ends[0] - margin, ends[1] + margin)
    bottom, top = _shown_range(result)
    margin = 0.02 * (top - bottom)
    axes.set_ylim(bottom - margin * (bottom > 0), top + margin)
    levels = np.linspace(bottom, top, 6)
    axes.set_yticks(levels, [f"{level:g}" for level in levels])
    ticks = _logit_ticks(*ends) if spread else ["0", "0.25", "0.5", "0.75", "1"]
    axes.set_xticks(position(np.array(ticks, float)), ticks)
    axes.set_xlabel("threshold (logit scale)" if spread else "threshold", labelpad=2)
    axes.set_ylabel(metric_name)

    axes.annotate(
        _shortened(result.title, 9, wide, bold=True),
        (0, 1),
        (0, 48),
        "axes fraction",
        "offset points",
        size=9,
        weight="bold",
    )
    axes.annotate(
        "\n".join(_shortened(line, 7.5, wide) for line in _numbers(result, metric_name)),
        (0, 1),
        (0, 5.5),
        "axes fraction",
        "offset points",
        size=7.5,
    )


def _numbers(result, metric_name):
    """The lines of numbers above a panel."""
    trained, curve, confidence = result.trained, result.curve, result.confidence

    def interval(limits, form):
        return f" [{', '.join(map(form, limits))}]" if limits else ""

    expected = confidence.expected_metric
    return (
        f"threshold {threshold_text(trained.x)}{interval(confidence.x_interval, threshold_text)}",
        f"{metric_name} {trained.metric:.4f}{interval(confidence.metric_interval, '{:.4f}'.format)}",
        ("gain unknown" if confidence.gain is None else f"gain {confidence.gain:+.4f}")
        + f"{interval(confidence.gain_interval, '{:+.4f}'.format)} over {trained.metric_at_half:.4f} at 0.5",
        ("" if expected is None else f"{expected:.4f} expected on new images; ")
        + f"{curve.tp[0] + curve.fn[0]:,} positives",
    )


def _shown_range(result):
    """The range of the vertical axis: 0 to 1, or the lower or upper part of it where the metric lies in that part."""
    low, high = result.confidence.metric_interval or (result.trained.metric,) * 2
    highest = max(result.trained.metric, high)
    lowest = min(np.median(result.curve.metric), low)

    def room_for(span):
        steps = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1)
        return next(step for step in steps if step >= min(1.1 * span, 1))

    return 1 - room_for(1 - lowest) if lowest > 0.9 else 0, room_for(highest)


def _logit(thresholds):
    thresholds = np.asarray(thresholds, np.float64)
    return np.log(thresholds / (1 - thresholds))


def _logit_ends(x, interval):
    """The range of a logit axis: 0.0001 to 0.9999, or more where the threshold or its interval lies outside."""
    shown = _logit([x, *(interval or ()), 1e-4, 1 - 1e-4])
    first, last = _logit(THRESHOLDS[[0, -1]])
    room = 0.06 * (shown.max() - shown.min())
    return max(shown.min() - room, first), min(shown.max() + room, last)


def _logit_ticks(low, high):
    """Labels of some five ticks on a logit axis: 0.5, and thresholds that are a power of ten away from 0 or 1."""
    decades = range(2, 14)
    below = [f"{10.0**-k:g}" for k in decades if low <= _logit(10.0**-k)]
    above = [f"{1 - 10.0**-k:.{k}f}" for k in decades if _logit(1 - 10.0**-k) <= high]
    step = math.ceil(len(below + above) / 4)
    return [*below[step - 1 :: step][::-1], "0.5", *above[step - 1 :: step]]


def _drawable(x, y, columns=1500):
    """The curve with fewer points: the lowest and the highest value in each of `columns` columns of its panel.

    So no peak is lost, because a panel has fewer pixels than that from left to right.

    Parameters
    ----------
    x, y : arrays, shape (n,)
        x increases.

    Returns
    -------
    x, y : arrays, shape (m,), m <= 2 * columns + 3
    """
    column = np.floor((x - x[0]) * (columns / (x[-1] - x[0])))
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    extremes = np.stack([np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)], axis=1)
    return np.append(np.repeat(x[starts], 2), x[-1]), np.append(extremes, y[-1])


def slices(counts, indices):
    """The slices in the counts, with the masks that the trained thresholds predict.

    Parameters
    ----------
    counts : counts.Counts
    indices : sequence of int, one per class
        Indices of the trained thresholds in counts.THRESHOLDS.

    Returns
    -------
    list of Slice
    """
    shown = [(o.name, o.image, o.truth, o.bins) for o in counts.shown]
    return [Slice(name, image, truth, bins > np.array(indices)) for name, image, truth, bins in shown]


def draw_slices(slices, classes, title):
    """Draw slices side by side, with a row per class, and hits, misses and false alarms in colour.

    Parameters
    ----------
    slices : list of Slice, at least one, all of the same shape
    classes : list of str, at least one
        The name of each class.
    title : str

    Returns
    -------
    bytes
        A PNG.
    """
    height, width = slices[0].image.shape
    side = min(PANEL_SIDE, math.isqrt(SHOWN_PIXELS // (len(slices) * len(classes))))
    shrink, grow = math.ceil(max(height, width) / side), max(side // max(height, width), 1)
    high, wide = (math.ceil(length / shrink) * grow for length in (height, width))

    gap, line = 8, 20
    top = gap + 3 * line + gap  # title, legend, names of the slices
    row = line + high + gap
    # Wide enough for the text even if there are few slices.
    size = max(len(slices) * (wide + gap) + gap, 900), top + len(classes) * row
    page = Image.new("L", size, 255)
    draw = ImageDraw.Draw(page)
    regular, bold = _font(13), _font(13, bold=True)

    def write(x, y, text, font, room):
        draw.text((x, y + line / 2), _cut(text, font, room), fill=0, font=font, anchor="lm")

    write(gap, gap, title, _font(15), size[0] - 2 * gap)
    legend = []
    x = gap
    for outcome in OUTCOMES:
        legend.append((x, gap + line + 4))
        write(x + 20, gap + line, outcome, regular, 400)
        x += 20 + math.ceil(regular.getlength(outcome)) + 24
    lefts = [gap + i * (wide + gap) for i in range(len(slices))]
    tops = [top + i * row + line for i in range(len(classes))]
    for x, shown in zip(lefts, slices, strict=True):
        write(x, gap + 2 * line, shown.name, regular, wide)
    for y, name in zip(tops, classes, strict=True):
        write(gap, y - line, name, bold, size[0] - 2 * gap)

    canvas = np.array(page) // (256 // GREYS)
    for i, (x, y) in enumerate(legend):
        canvas[y : y + 12, x : x + 12] = (i + 1) * GREYS + GREYS // 2
    for x, shown in zip(lefts, slices, strict=True):
        image = np.asarray(Image.fromarray(shown.image).reduce(shrink)) // (256 // GREYS)
        for i, y in enumerate(tops):
            panel = image + GREYS * _outcomes(shown.truth[..., i], shown.prediction[..., i], shrink)
            canvas[y : y + high, x : x + wide] = panel.repeat(grow, axis=0).repeat(grow, axis=1)
    picture = Image.fromarray(canvas)
    picture.putpalette(_palette())
    return _png(picture)


def _outcomes(truth, prediction, shrink):
    """The most frequent outcome in each cell of shrink x shrink pixels; none only if no pixel of the cell has one.

    So thin cracks remain visible. Of equally frequent ones, a miss comes before a false alarm, and that before a hit.

    Parameters
    ----------
    truth, prediction : bool arrays, shape (height, width)
    shrink : int

    Returns
    -------
    uint8 array, shape (ceil(height / shrink), ceil(width / shrink))
        0 for none, then in the order of OUTCOMES.
    """
    # Three counts of 20 bits in one integer, so that one sum counts all three.
    packed = np.array([0, 1 << 40, 1 << 20, 1]).take(prediction + 2 * truth.astype(np.uint8))
    packed = np.pad(packed, [(0, -length % shrink) for length in truth.shape])
    packed = sum(packed[i::shrink] for i in range(shrink))
    packed = sum(packed[:, i::shrink] for i in range(shrink))
    hits, misses, false_alarms = (packed >> bits & 0xFFFFF for bits in (0, 20, 40))
    outcome = np.where(hits > np.maximum(misses, false_alarms), 1, np.where(misses >= false_alarms, 2, 3))
    return np.where(packed, outcome, 0).astype(np.uint8)


def _palette():
    """The palette, as a flat list: GREYS greys, then the same greys tinted by each of the OUTCOMES."""
    greys = np.repeat(np.linspace(0, 255, GREYS)[:, None], 3, axis=1)
    tinted = [greys * (1 - opacity) + np.array(color) * opacity for color, opacity in OUTCOMES.values()]
    return np.rint(np.concatenate([greys, *tinted])).astype(int).ravel().tolist()


def _wrapped(text, points, inches):
    """The text broken into lines at most `inches` wide."""
    lines = [""]
    font = _font(points * DPI / 72)
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        if font.getlength(line) <= inches * DPI:
            lines[-1] = line
        else:
            lines.append(word)
    return [line for line in lines if line]


def _shortened(text, points, inches, bold=False):
    return _cut(text, _font(points * DPI / 72, bold), inches * DPI)


def _cut(text, font, room):
    """The text, without its middle if it is wider than `room` pixels; a mark replaces unprintable characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    cut, length = text, len(text)
    while font.getlength(cut) > room and length > 1:
        length -= 1
        cut = text[: (length + 1) // 2] + "…" + text[len(text) - length // 2 :]
    return cut


def _font(size, bold=False):
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # up to four times faster than the default, up to 10 % larger
    return file.getvalue()
