"""The house rules that a machine can check: imports, generated code, what is packaged, file sizes."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "protocol": {"protocol"},
    "compression": {"compression"},
    "coordinator": {"coordinator", "protocol"},
    "worker": {"worker", "protocol", "compression"},
}
NO_TORCH = ("protocol", "coordinator")


def sources(package: str) -> list[Path]:
    return [p for p in sorted((ROOT / package).rglob("*.py")) if not p.name.endswith("_pb2.py")]


def imports(path: Path) -> set[str]:
    """Dotted names of all imports, relative ones resolved below ``potluck``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["potluck", *path.parent.relative_to(ROOT).parts]
            base = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_layout_allows(package):
    for path in sources(package):
        for name in imports(path):
            if name.startswith("potluck."):
                other = name.split(".")[1]
                assert other in PACKAGES[package] | {"__version__"}, f"{path.name} imports {name}"
            if package in NO_TORCH:
                assert name.split(".")[0] not in ("torch", "transformers", "safetensors"), f"{path.name} imports {name}"


def test_only_the_command_that_converts_opens_a_pickle():
    """No run, and nothing that a worker or a coordinator loads, can get there."""
    everything = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in sources(package))]
    unpickling = [p.name for p in everything if {"pickle", "torch.load"} & imports(p) or "torch.load(" in p.read_text()]
    assert unpickling == ["convert.py"]
    assert [p.name for p in everything if "worker.convert" in p.read_text() or ".convert import" in p.read_text()] == [
        "cli_model.py"
    ]


def test_compression_is_no_regular_package():
    """A ``compression/__init__.py`` on the path would hide Python 3.14's standard package."""
    assert not (ROOT / "compression" / "__init__.py").exists()


def test_generated_code_is_current():
    from potluck.protocol.generate import HERE, generate

    for name, text in generate().items():
        assert (HERE / name).read_text() == text, f"run: python -m potluck.protocol.generate ({name})"


def test_files_are_short():
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.js"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split():
        if not name.endswith("_pb2.py"):
            assert len((ROOT / name).read_text().splitlines()) <= 400, name


def test_a_coordinator_starts_without_torch():
    """Everything a coordinator imports, in a process where torch and transformers cannot be imported."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'datasets'): sys.modules[name] = None\n"
        "import potluck.cli, potluck.coordinator.service, potluck.demo\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_wheel_holds_every_module(tmp_path):
    """Packages are listed by name in pyproject.toml: none may be forgotten."""
    import tomllib

    inner = (p.parent.relative_to(ROOT) for package in PACKAGES for p in (ROOT / package).glob("*/__init__.py"))
    within = {".".join(["potluck", *folder.parts]) for folder in inner}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == {"potluck", *(f"potluck.{p}" for p in PACKAGES), *within}
    page = ROOT / "coordinator" / "dashboard" / "page"
    packaged = {f"page/{p.relative_to(page)}" for p in page.rglob("*") if p.is_file()}
    patterns = project["tool"]["setuptools"]["package-data"]["potluck.coordinator.dashboard"]
    assert packaged <= {
        f"{p.parent.relative_to(page.parent)}/{p.name}" for pattern in patterns for p in page.parent.glob(pattern)
    }
    assert {p.suffix for p in page.iterdir() if p.is_file()} <= {".html", ".css", ".js", ".svg"}


def test_the_page_holds_only_what_it_names_from_elsewhere():
    """Vendored files are those that the README beside them names, unchanged."""
    vendor = ROOT / "coordinator" / "dashboard" / "page" / "vendor"
    sums = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.M))
    assert {p.name for p in vendor.iterdir()} - {"README.md", "uPlot.LICENSE.txt"} == sums.keys()
    for name, digest in sums.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
