"""Pages of the site that are files outside of docs/, and links to such files."""

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
LINK = re.compile(r"(\[[^\]]*\]\()([^):#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page.name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every relative link at its page of the site. What has no page keeps the text of its link."""
    source = Path(page.file.abs_src_path or DOCS / page.file.src_uri)
    shown = PAGES.get(source, source)

    def pointed(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        target = PAGES.get(target, target)
        if not target.is_relative_to(DOCS):
            return link[1][1:-2]
        return f"{link[1]}{os.path.relpath(target, shown.parent)}{link[3] or ''})"

    return LINK.sub(pointed, markdown)
