"""What the repository says about itself: commands, notices, documentation."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import mmaccel
from mmaccel.method import registry

ROOT = Path(mmaccel.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def test_ci_runs_the_command_of_the_readme(tmp_path):
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^command='(.*)'$", script, re.MULTILINE)
    assert command in (ROOT / "README.md").read_text()
    # the script itself, with a command that fails in its own way
    copy = tmp_path / ".ci" / "run"
    copy.parent.mkdir()
    copy.write_text(script.replace(command, "echo ran in $(basename $PWD); exit 7"))
    done = subprocess.run(["bash", copy], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert f"ran in {tmp_path.name}" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_pages_compiles_and_names_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page.name, "exec")
        for name in re.findall(r"\bmmaccel\.(\w+)", block):
            assert hasattr(mmaccel, name) or importlib.util.find_spec(f"mmaccel.{name}"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_specs_and_commands_in_pages_exist(page):
    from mmaccel.measure.generation_settings import CACHE_DIT, check_settings
    from mmaccel.method import parse

    text = page.read_text(encoding="utf-8")
    for spec in re.findall(r"(?<![\w-])((?:[a-z]+-)*[a-z]+:[a-z_]+=[\w.]+(?:[;+][\w:=.;+-]+)?)", text):
        if spec.startswith(CACHE_DIT):  # a peer in benchmarks, no method of ours
            check_settings([spec])
        else:
            assert parse(spec), spec
    commands = {"demo", "ask", "bench", "list", "explain", "probe", "generate", "calibrate", "COMMAND"}
    for name in re.findall(r"^(?:uv run )?mmaccel (?!-)(\w+)", text, re.MULTILINE):
        assert name in commands, name


def test_every_method_is_in_the_notice():
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for name in registry():
        assert name in notice


def test_the_licence_is_the_standard_text():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "docs" / "method_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", registry())
def test_method_pages_hold_knobs_and_source(pages, name):
    cls = registry()[name]
    text = pages.page(cls)
    assert text.startswith(f"# {name}\n")
    assert cls.info.source in text
    for knob in dataclasses.fields(cls):
        assert f"| `{knob.name}` | `{knob.default}` |" in text
        assert knob.metadata["doc"].replace("|", "\\|") in text
    tables = [line for line in text.splitlines() if line.startswith("| `")]
    # a bar inside a cell would make a column
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == ({5} if dataclasses.fields(cls) else set())


def test_the_index_links_every_page(pages):
    assert re.findall(r"\]\((.*)\.md\)", pages.index()) == list(registry())


def test_the_navigation_names_existing_pages():
    named = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
