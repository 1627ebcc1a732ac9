"""HTML reports: one stylesheet and page layout, matplotlib figures and images inside the page.

evaluate.py and hpo_sweep.py write their reports with it. A page is one file and loads nothing.
"""

import base64
import hashlib
import io
import re

import jinja2
import matplotlib
from markupsafe import Markup
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#086, #4d9); --bad: light-dark(#b30, #f85) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.3rem; line-height: 1.2; margin: 2.5rem 0 .8rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
small, .unsure { opacity: .75 }
summary { cursor: pointer }
meter { width: 8rem }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }
.sure { color: var(--accent); font-weight: 600 }
.flag { color: var(--bad); display: block }

/* tables; .means: an interval below its mean */
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
tr:first-child th { vertical-align: bottom }
td small { white-space: nowrap }
.means small { display: block }
.means th:first-child { min-width: 7rem }

/* grids: figures, sections of the best, images in a row, pairs of images */
.plots, .best, .pairs { display: grid; gap: 1rem 2rem }
.plots, .best, .pairs { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
.best h3 { margin: 0 }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); margin-bottom: .6rem }
.pairs .row { grid-template-columns: 1fr 1fr }

figure { margin: 0 }
figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }
img { max-width: 100%; border-radius: 4px }
.row a:first-child { display: block; aspect-ratio: 1 }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover }
.plot { display: block; width: 100%; max-width: 36rem; fill: currentColor; stroke-linejoin: round }
.plot text { font-family: inherit !important }

/* <figure id=x><a href=#x><img></a><a class=close href=#_></a></figure>: large while the address ends in #x */
figure[id] { scroll-margin-top: 40vh }
.close { display: none }
:target > .close { display: block; position: fixed; inset: 0; background: #000d; z-index: 1; cursor: zoom-out }
:target > a > img { position: fixed; inset: 0; margin: auto; z-index: 2; pointer-events: none; max-width: none }
:target > a > img { width: 94vw; height: 94vh; height: 94dvh; aspect-ratio: auto; object-fit: contain }
"""

LAYOUT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% include "body" %}
</body>
</html>
"""

# matplotlib's black, white and first colour become colours that follow the reader's light or dark mode.
SVG_COLOURS = {"#000000": "currentColor", "#ffffff": "Canvas", "#1f77b4": "var(--accent)"}


def render_page(body, title, **values):
    """An HTML page; `body` is Jinja2 source that may use `title` and `values`.

    Values are escaped unless they are Markup. Errors: jinja2.UndefinedError for a name without a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"layout": LAYOUT, "body": body}),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("layout").render(title=title, style=Markup(STYLE), **values)


def figure_svg(figure, label):
    """Markup of a matplotlib Figure as inline SVG, as wide as the space it is given; screen readers read the label."""
    encoded = io.StringIO()
    # No date and a fixed salt: equal figures give equal text. Text stays text, so that fonts come from the page.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(encoded, format="svg", transparent=True, metadata=metadata)
    source = encoded.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', source)[1]
    # What comes before </defs> is a style that would apply to the rest of the page.
    content = source.partition("</defs>")[2].rpartition("</svg>")[0]
    # Figures call their parts axes_1, text_1 and so on, but the ids of a page must differ.
    prefix = f"svg-{hashlib.sha256((label + source).encode()).hexdigest()[:12]}-"

    def adapt(tag):
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])
        return re.sub("#[0-9a-f]{6}", lambda colour: SVG_COLOURS.get(colour[0], colour[0]), text)

    root = Markup('<svg class="plot" role="img" aria-label="{}" viewBox="{}">').format(label, view_box)
    return root + Markup(re.sub("<[^>]*>", adapt, content)) + Markup("</svg>")


def data_uri(image, side=None):
    """The image as text for a page, at most `side` px wide and high; a smaller one is not enlarged."""
    image = image.convert("RGB")
    if side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= 128 else "webp"
    encoded = io.BytesIO()
    image.save(encoded, kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(encoded.getvalue()).decode()
