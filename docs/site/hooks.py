"""Pages of the site that are files outside of docs/ or notebooks, and links to such files."""

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
PAGES = {
    DOCS.parent / name: DOCS / page
    for name, page in {
        "README.md": "index.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
        "tests/parity/README.md": "parity.md",
    }.items()
}
LINK = re.compile(r"\[([^\]]*)\]\(([^):#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page.name, abs_src_path=str(source)))
    for notebook in sorted(DOCS.glob("notebooks/*.ipynb")):
        name = notebook.with_suffix(".md").relative_to(DOCS).as_posix()
        files.append(File.generated(config, name, content=page_of(notebook)))
    return files


def page_of(notebook: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code gave."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "image/png" in output["data"]:
                image = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="the output" width="50" src="data:image/png;base64,{image}">')
            else:
                parts.append(f"```text\n{''.join(output['data']['text/plain'])}\n```")
    return "\n\n".join([*parts, f"[The notebook]({notebook.name})", ""])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every relative link at its page of the site, whose title replaces a path as the text of the link. A link to
    what has no page becomes its text."""
    source = Path(page.file.abs_src_path or DOCS / page.file.src_uri)
    shown = PAGES.get(source, source)

    def pointed(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        file = (source.parent / path).resolve()
        target = PAGES.get(file, file)
        if not target.is_relative_to(DOCS):
            return text
        if text == path and (title := re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)):
            text = title[1]
        return f"[{text}]({os.path.relpath(target, shown.parent)}{anchor})"

    return LINK.sub(pointed, markdown)
