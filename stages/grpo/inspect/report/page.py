"""page: one HTML file out of report.html, its style, its scripts, the plotting library and the data.

The page may load nothing and run nothing but these scripts: its Content-Security-Policy names their digests.
A block of data is base64 of gzip of JSON. Base64 has no character that ends a script element, so what a model
wrote is never in the page as such.
"""

import base64
import gzip
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

_HERE = files("grpo.inspect.report")
SCRIPTS = ("text.js", "charts.js", "heat.js", "filter.js", "cards.js", "browser.js", "report.js")
"""In the order in which they are in the page; each is plain functions."""
STYLES = ("report.css", "rollouts.css")
_LEVEL = 6  # of gzip: 9 is three times slower and 2 % smaller


def page(title: str, blocks: dict[str, Any]) -> bytes:
    """The page, with `blocks` of data by name: "data", and "heat-0" and "rollouts-0" of the first run."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    body = "\n".join(map(_read, SCRIPTS))
    script = f'"use strict";\n(() => {{\n{body}\nmain();\n}})();\n'
    texts = {name: json.dumps(data, allow_nan=False, separators=(",", ":")) for name, data in blocks.items()}
    parts = {
        "title": html.escape(title),
        "policy": f"script-src {_digest(script)} {_digest(plotly)}",
        "style": "".join(map(_read, STYLES)),
        "plotly": html.escape(" ".join(re.findall(r"^\* (.*)$", plotly[:300], re.MULTILINE))),
        "blocks": "\n".join(_block(name, text) for name, text in {**texts, "plotly": plotly}.items()),
        "script": script,
    }
    # In one pass: what was put in is not searched for more places.
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("report.html"))
    return text.encode()


def _block(name: str, text: str) -> str:
    packed = base64.b64encode(gzip.compress(text.encode(), _LEVEL, mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
