"""The blocks that the scripts have in common, `# ==== shared: name` up to the next banner, word for word.

python tests/shared_blocks.py                    # rewrites every script's copies from smac_offline_to_online.py
python tests/shared_blocks.py iql.py             # from another script
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if "# /// script" in p.read_text())
BANNER = re.compile(r"^(?=# ==== )", re.MULTILINE)


def parts(script: Path) -> list[str]:
    return [part for part in BANNER.split(script.read_text()) if part]


def blocks(script: Path) -> dict[str, str]:
    """{first line: text} of each shared block."""
    return {part.splitlines()[0]: part for part in parts(script) if part.startswith("# ==== shared: ")}


def main() -> None:
    source = ROOT / (sys.argv[1] if len(sys.argv) > 1 else "smac_offline_to_online.py")
    ours = blocks(source)
    for script in SCRIPTS:
        text = "".join(ours.get(part.splitlines()[0], part) for part in parts(script))
        if text != script.read_text():
            script.write_text(text)
            print(f"{script.name}: rewritten")


if __name__ == "__main__":
    main()
