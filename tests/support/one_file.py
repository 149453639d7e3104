"""The page as one file that opens without a server, as a report is: styles, modules and answers are inside it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from potluck.coordinator import dashboard

PAGE = Path(dashboard.__file__).with_name("page")


def one_file(answers: dict[str, Any]) -> str:
    """``answers``: path of the API to what it says. Modules become ``data:`` addresses, named by an import map."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    names = {path.name for path in PAGE.glob("*.js")}

    def renamed(found: re.Match[str]) -> str:
        return f'{found[1]}"potluck/{found[2]}"' if found[2] in names else found[0]

    modules = {}
    for name in sorted(names):
        code = re.sub(r'(\bfrom |\bimport\()"\./([\w.]+)"', renamed, (PAGE / name).read_text(encoding="utf-8"))
        modules[f"potluck/{name}"] = f"data:text/javascript;base64,{base64.b64encode(code.encode()).decode()}"
    packed = base64.b64encode(gzip.compress(json.dumps(answers).encode())).decode()
    html = re.sub(r'<link rel="(?:module)?preload".*?>\n', "", html)
    html = re.sub(
        r'<link rel="stylesheet" href="static/(.*?)">', lambda m: f"<style>{(PAGE / m[1]).read_text()}</style>", html
    )
    html = re.sub(
        r'<script defer src="static/(.*?)"></script>',
        lambda m: f"<script>{(PAGE / m[1]).read_text()}</script>",
        html,
    )
    start = (
        f'<script type="application/octet-stream" id="potluck-data">{packed}</script>\n'
        f'<script type="importmap">{json.dumps({"imports": modules})}</script>\n'
        '<script type="module">import "potluck/app.js";</script>'
    )
    return html.replace('<script type="module" src="static/app.js"></script>', start)
