"""The page as one file that a browser opens from disk: styles, scripts and data inside, nothing loaded from anywhere.

From ``file://`` no module may import another file. So every module becomes a ``data:`` address, which the page's import
map gives a name; of the modules only the names of what they import are changed. All else that runs or styles is inline
and named in the policy by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

IMPORT = re.compile(r"""(\bfrom\s*|\bimport\s*\(?\s*)(["'])(\.{1,2}/[^"']+)\2""")
STYLE = re.compile(r'<link rel="stylesheet" href="static/([^"]+)">')
PRELOAD = re.compile(r'<link rel="(?:module)?preload"[^>]*>\n?')
SCRIPT = re.compile(r'<script (?:defer )?src="static/([^"]+)"></script>')
MODULE = re.compile(r'<script type="module" src="static/([^"]+)"></script>')
MARK = '<meta name="generator" content="potluck report">'
POLICY = (
    "default-src 'none'; script-src data: {scripts}; style-src {styles}; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def bundle(files: Path, answers: Mapping[str, bytes]) -> bytes:
    """The page in ``files`` with these answers: JSON by the path that the page asks for it. The page finds them in the
    element ``potluck-data``: one JSON object, with gzip, in base64."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}

    def inline(kind: str, text: str, attributes: str = "") -> str:
        text = re.sub(rf"</(?={kind})", r"<\\/", text, flags=re.IGNORECASE)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
        return f"<{kind}{attributes}>{text}</{kind}>"

    def text(name: str) -> str:
        return (files / name).read_text(encoding="utf-8")

    html = PRELOAD.sub("", text("index.html"))
    html = STYLE.sub(lambda found: inline("style", text(found[1])), html)
    html = SCRIPT.sub(lambda found: inline("script", text(found[1])), html)
    [main] = MODULE.findall(html)
    names = {f"page/{name}": "data:text/javascript;base64," + packed for name, packed in modules(files, main).items()}
    start = inline("script", json.dumps({"imports": names}), ' type="importmap"')
    start += inline("script", f'import "page/{main}";', ' type="module"')
    html = MODULE.sub(lambda _: start, html)
    if "static/" in re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL):
        raise AssertionError("index.html loads something in a way that a report does not know")
    policy = POLICY.format(scripts=" ".join(hashes["script"]), styles=" ".join(hashes["style"]) or "'none'")
    head = f'<head>\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n{MARK}'
    data = f'<script type="application/json" id="potluck-data">{packed_answers(answers)}</script>'
    return html.replace("<head>", head, 1).replace("</body>", f"{data}\n</body>", 1).encode()


def modules(files: Path, main: str) -> dict[str, str]:
    """``main`` and every module that it needs, by name, in base64; what they import is named as in the import map."""
    found: dict[str, str] = {}
    left = [main]
    while left:
        name = left.pop()
        if name in found:
            continue

        def named(match: re.Match[str], name: str = name) -> str:
            other = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[3]))
            left.append(other)
            return f"{match[1]}{match[2]}page/{other}{match[2]}"

        source = IMPORT.sub(named, (files / name).read_text(encoding="utf-8"))
        found[name] = base64.b64encode(source.encode()).decode()
    return found


def packed_answers(answers: Mapping[str, bytes]) -> str:
    """As they stand in the file: no letter of base64 means anything to HTML, whatever peers call themselves."""
    whole = b"{%s}" % b",".join(json.dumps(path).encode() + b":" + body for path, body in answers.items())
    return base64.b64encode(gzip.compress(whole, 9, mtime=0)).decode()
