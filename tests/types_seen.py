"""Did the type checker see every module? Argument: mypy's linecount report, made over an installed wheel."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "condense": "condense",
    "methods": "condense.methods",
    "buffers": "condense.buffers",
    "eval": "condense.eval",
}


def modules() -> set[str]:
    """Every module of the checkout, by import name."""
    found = set()
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found.add(".".join([package, *(part for part in parts if part != "__init__")]))
    return found


def seen(report: Path) -> set[str]:
    """The modules of a linecount report."""
    return {line.split()[-1] for line in report.read_text().splitlines() if line.split()[-1] != "total"}


if __name__ == "__main__":
    missed = modules() - seen(Path(sys.argv[1]))
    if missed:
        sys.exit(f"the type checker did not see {', '.join(sorted(missed))}")
    print(f"types: {len(modules())} modules seen")
