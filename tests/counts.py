"""How long and how dense the scripts are: python tests/counts.py

lines     of the file
shared    lines below the banner, which are the same in all four scripts
network   the line of the first network
tokens    a code line, by Python's tokenize, without comments and docstrings
dense     comprehensions, conditional expressions and dict unions
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if "# /// script" in p.read_text())
BANNER = "# ============================== shared: the same in all four scripts"
DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
LAYOUT += (tokenize.ENCODING, tokenize.ENDMARKER)


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def annotations(tree: ast.AST) -> set[ast.AST]:
    """All nodes of type annotations, where | is no union of dicts."""
    nodes = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                nodes |= set(ast.walk(getattr(node, name)))
    return nodes


def is_dense(node: ast.AST) -> bool:
    is_union = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr)
    return is_union or isinstance(node, DENSE)


def counts(script: Path) -> dict[str, float]:
    text = script.read_text()
    tree = ast.parse(text)
    documentation = docstring_lines(tree)
    tokens, code_lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start[0] not in documentation:
            tokens += 1
            code_lines.add(token.start[0])
    lines = text.splitlines()
    banner = next((i for i, line in enumerate(lines) if line.startswith(BANNER)), len(lines))
    network = next((i for i, line in enumerate(lines, 1) if "(nn.Module)" in line), 0)
    dense = sum(map(is_dense, set(ast.walk(tree)) - annotations(tree)))
    return dict(
        lines=len(lines),
        shared=len(lines) - banner,
        network=network,
        tokens=round(tokens / len(code_lines), 2),
        dense=dense,
    )


def main() -> None:
    print(f"{'':<28}{'lines':>8}{'shared':>8}{'network':>8}{'tokens':>8}{'dense':>8}")
    for script in SCRIPTS:
        print(f"{script.name:<28}" + "".join(f"{x:>8}" for x in counts(script).values()))


if __name__ == "__main__":
    main()
