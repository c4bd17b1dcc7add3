"""A hook of mkdocs: one page for each method, made from what its class declares, when the site is built."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mmaccel.cli.catalogue import describe
from mmaccel.method import registry

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

    from mmaccel.method import Method

__all__ = ["index", "on_config", "on_files", "page"]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation, behind the first two entries."""
    pages: list[Any] = ["methods/index.md", *(f"methods/{name}.md" for name in registry())]
    if config.nav is not None:
        config.nav.insert(2, {"Methods": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages as generated files; nothing is written into the source folder."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "methods/index.md", content=index()))
    for name, cls in registry().items():
        files.append(File.generated(config, f"methods/{name}.md", content=page(cls)))
    return files


def index() -> str:
    """The table of all methods."""
    rows = []
    for name, cls in registry().items():
        facts = describe(cls)
        kind = "baseline" if facts["baseline"] else "lossless" if facts["lossless"] else "lossy"
        rows.append(f"| [{name}]({name}.md) | {facts['stage']} | {facts['verb']} | {facts['summary']} | {kind} |")
    head = "| method | stage | verb | what it does | kind |\n| --- | --- | --- | --- | --- |"
    return "# Methods\n\n" + "\n".join([head, *rows]) + "\n"


def page(cls: type[Method]) -> str:
    """One method: facts, knobs with ranges, presets with their sources, and the class docstring."""
    facts = describe(cls)
    name = facts["name"]
    lines = [f"# {name}", "", f"{facts['summary'][0].upper()}{facts['summary'][1:]}.", ""]
    lines += ["```python", f'with mmaccel.accelerate(model, "{name}") as handle:', "    ...", "```", ""]
    source = facts["source"] if facts["baseline"] else f"{facts['source']} ({facts['year']})"
    table = {
        "source": source,
        "licence of the authors' code": facts["licence"],
        "stage": facts["stage"],
        "verb": facts["verb"],
        "works on": ", ".join(facts["targets"]),
        "place": "; ".join(facts["works"]),
        "needs": ", ".join(facts["needs"]),
        "output": "the same as without it" if facts["lossless"] else "changes: see the quality tables",
        "training": "trained" if facts["trained"] else "none needed",
    }
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in table.items() if value), ""]
    if facts["knobs"]:
        lines += ["## Knobs", "", "| knob | default | range | meaning |", "| --- | --- | --- | --- |"]
    for knob in facts["knobs"]:
        default = "required" if knob["required"] else f"`{knob['default']}`"
        lines.append(f"| `{knob['name']}` | {default} | {_cell(knob['range'])} | {_cell(knob['doc'])} |")
    for preset, values in facts["presets"].items():
        known = "; ".join(f"{key}={value}" for key, value in values.items() if key != "source")
        lines += ["", f"Preset for {preset}: `{known}` ({values.get('source', 'no source')})."]
    lines += ["", "## In its own words", "", inspect.getdoc(cls) or "", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
