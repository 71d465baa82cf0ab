"""page: one HTML file out of report.html, its style, its scripts, the plotting library and the data.

The page may load nothing and run nothing but these scripts: its Content-Security-Policy names their digests.
"""

import base64
import hashlib
import html
import re
from importlib.resources import files
from typing import Any

from grpo.inspect.report.pack import pack, pack_bytes
from grpo.inspect.report.rollouts import LOGPROB_RANGE, RATIO_RANGE, Block

_HERE = files("grpo.inspect.report")
SCRIPTS = ("data.js", "text.js", "charts.js", "heat.js", "filter.js", "cards.js", "browser.js", "report.js")
"""In the order in which they stand in the page; each is plain functions."""


STYLES = ("report.css", "rollouts.css")


def page(title: str, document: dict[str, Any], heats: list[Block], rollouts: list[Block]) -> bytes:
    """The page. `heats` and `rollouts`: one block a run, in the order of document["runs"]."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    script = _script()
    ranges = {"logprob_range": LOGPROB_RANGE, "ratio_range": RATIO_RANGE}
    blocks = {"data": pack({**document, **ranges}), "plotly": pack_bytes(plotly.encode())}
    blocks |= {f"heat-{index}": pack(*block) for index, block in enumerate(heats)}
    blocks |= {f"rollouts-{index}": pack(*block) for index, block in enumerate(rollouts)}
    parts = {
        "title": html.escape(title),
        "policy": f"script-src {_digest(script)} {_digest(plotly)}",
        "style": "".join(_read(name) for name in STYLES),
        "plotly": html.escape(" ".join(re.findall(r"^\* (.*)$", plotly[:300], re.MULTILINE))),
        "blocks": "\n".join(
            f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blocks.items()
        ),
        "script": script,
    }
    # In one pass: what was put in is not searched for more places.
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("report.html"))
    return text.encode()


def _script() -> str:
    body = "\n".join(_read(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}\nmain();\n}})();\n'


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
