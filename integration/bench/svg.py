"""Line plots as SVG: panels side by side, one legend. No dependencies."""

import math
from html import escape

COLOURS = {
    "fio-io_uring": "#444444", "fio-psync": "#999999", "qsd": "#d95f02", "qsd-iothread": "#e6ab02",
    "stock": "#7570b3", "vublkd": "#1b7837", "vublkd-poll0": "#5aae61", "vublkd-pin": "#2166ac",
    "vublkd-threads": "#e7298a",
}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 380, 260, 64, 52, 46, 24


def ticks(top):
    """Round values from 0 to at least `top`, four to eight of them."""
    step = 10 ** math.floor(math.log10(top / 4)) if top > 0 else 1
    for factor in (1, 2, 5, 10):
        if top / (step * factor) <= 6:
            step *= factor
            break
    return [n * step for n in range(math.ceil(top / step - 1e-9) + 1)]


def label(value):
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


class Panel:
    """`lines`: name -> [(category, median, low, high)]."""

    def __init__(self, title, x_title, y_title, categories, lines, log=False):
        self.title, self.x_title, self.y_title = title, x_title, y_title
        self.categories, self.lines, self.log = categories, lines, log
        values = [v for line in lines.values() for _, *vs in line for v in vs if v > 0]
        top, low = max(values, default=1), min(values, default=1)
        if log:
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(top) + 1e-9) + 1)
            self.ticks = [10.0**e for e in exponents]
        else:
            self.ticks = ticks(top)

    def y(self, value):
        first, last = self.ticks[0], self.ticks[-1]
        if self.log:
            value, first, last = (math.log10(max(v, first)) for v in (value, first, last))
        return TOP + HEIGHT * (1 - (value - first) / ((last - first) or 1))

    def x(self, category):
        return LEFT + WIDTH * (self.categories.index(category) + 0.5) / len(self.categories)

    def draw(self):
        yield f'<text x="{LEFT + WIDTH / 2}" y="{TOP - 14}" class="t">{escape(self.title)}</text>'
        for tick in self.ticks:
            y = self.y(tick)
            yield f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#e4e4e4"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>'
        for category in self.categories:
            x = self.x(category)
            yield f'<path d="M{x:.1f} {TOP + HEIGHT}v4" stroke="#666"/>'
            yield f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{escape(str(category))}</text>'
        yield f'<path d="M{LEFT} {TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="#666"/>'
        middle = TOP + HEIGHT / 2
        yield f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">{escape(self.x_title)}</text>'
        yield f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{escape(self.y_title)}</text>'
        for n, (name, points) in enumerate(self.lines.items()):
            colour, strong = COLOURS.get(name, "#000"), name == "vublkd"
            # A little aside, so that bars of equal values do not hide each other.
            aside = (n - len(self.lines) / 2) * 1.6
            at = [(self.x(c) + aside, self.y(mid), self.y(low), self.y(high)) for c, mid, low, high in points]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in at)
            yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{3 if strong else 1.6}"/>'
            for x, y, low, high in at:
                yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1"/>'
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if strong else 3}" fill="{colour}"/>'


def figure(title, panels, names):
    """The text of an SVG file; `names`: name -> words of the legend."""
    width = sum(WIDTH + LEFT + GAP for _ in panels) + GAP
    columns = 2 * len(panels)
    rows = (len(names) + columns - 1) // columns
    height = TOP + HEIGHT + BOTTOM + 24 + 20 * rows + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12" fill="#222">',
        "<style>.t{text-anchor:middle;font-weight:bold}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{width / 2}" y="18" class="t" font-size="14">{escape(title)}</text>',
    ]
    for n, panel in enumerate(panels):
        out.append(f'<g transform="translate({n * (WIDTH + LEFT + GAP) + GAP / 2} 0)">')
        out += panel.draw()
        out.append("</g>")
    for n, (name, words) in enumerate(names.items()):
        x = 24 + n % columns * (width - 24) / columns
        y = TOP + HEIGHT + BOTTOM + 24 + 20 * (n // columns)
        out.append(f'<path d="M{x} {y - 4}h18" stroke="{COLOURS.get(name, "#000")}" stroke-width="4"/>')
        out.append(f'<text x="{x + 24}" y="{y}">{escape(words)}</text>')
    return "\n".join([*out, "</svg>", ""])
