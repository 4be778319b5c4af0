"""What the scripts have in common stands in each of them below the banner, word for word.

python tests/shared_blocks.py                # rewrites the copies from smac_offline_to_online.py
python tests/shared_blocks.py iql.py         # from another script
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if "# /// script" in p.read_text())
BANNER = "# ============================== shared: the same in all four scripts"


def halves(script: Path) -> tuple[str, str]:
    """The method, and from the banner on what is shared."""
    text = script.read_text()
    start = text.index(BANNER)
    return text[:start], text[start:]


def main() -> None:
    source = ROOT / (sys.argv[1] if len(sys.argv) > 1 else "smac_offline_to_online.py")
    shared = halves(source)[1]
    for script in SCRIPTS:
        method, copy = halves(script)
        if copy != shared:
            script.write_text(method + shared)
            print(f"{script.name}: rewritten")


if __name__ == "__main__":
    main()
