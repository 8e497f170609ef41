"""The ratchets: layers, budgets, the tree in the README, imports without effects, no pickle, no eval."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fledge"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LAYERS = [
    {"types", "errors"},
    {"config", "registry", "batches", "files"},
    {"layers", "text", "store"},
    {"models", "objectives", "data"},
    {"formats"},
    {"train", "infer", "evals"},
    {"rl", "safety", "synth"},
    {"flywheel"},
    {"recipes", "serve"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_NESTING = 400, 50, 7, 3
OVER_BUDGET: set[str] = set()  # may only shrink


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]


def test_the_layer_table_stands_in_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.split("## Who may import whom")[1].split("```")[1]
    for name in re.findall(r"[a-z]+", re.sub(r"\(later[^)]*\)", "", table)):
        assert name in LEVEL, f"{name} stands in docs/architecture.md but not in LAYERS"


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(LEVEL)


def our_imports(tree: ast.Module) -> list[str]:
    """The modules of ours that a module imports, wherever in it the import stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [module for module in found if module.startswith("fledge.")]


def test_imports_point_downward() -> None:
    pairs = [(path, module) for path, tree in TREES.items() for module in our_imports(tree)]
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, module in pairs
        if part_of(path) != module.split(".")[1] and LEVEL[module.split(".")[1]] >= LEVEL[part_of(path)]
    ]
    assert not wrong


def test_files_stay_within_budget() -> None:
    long = {str(p.relative_to(ROOT)) for p in FILES if len(p.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES}
    assert long <= OVER_BUDGET


def test_functions_stay_within_budget() -> None:
    wrong = []
    for path, node in functions():
        where = f"{path.relative_to(ROOT)}:{node.name}"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        parameters = [a for a in arguments if a.arg not in ("self", "cls")]
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES:
            wrong.append(f"{where} is too long")
        if len(parameters) > MAX_PARAMETERS:
            wrong.append(f"{where} has {len(parameters)} parameters")
        if nesting(node) > MAX_NESTING:
            wrong.append(f"{where} is nested too deeply")
    assert not [line for line in wrong if line.split(" ")[0] not in OVER_BUDGET]


def nesting(node: ast.AST, depth: int = 0) -> int:
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        inner = depth + 1 if isinstance(child, blocks) and not is_elif else depth
        deepest = max(deepest, nesting(child, inner))
    return deepest


def test_no_module_does_anything_when_imported() -> None:
    """Statements at module level define things; a bare call or a loop there would act."""
    acting = []
    for path, tree in TREES.items():
        if path.name == "__main__.py":
            continue
        for node in tree.body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.For | ast.While | ast.With) or (isinstance(node, ast.Expr) and not is_docstring):
                acting.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not acting


BANNED_NAMES = {"eval", "exec", "compile"}
BANNED_CALLS = {"torch.save", "torch.load", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "np.save"}


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return f"{node.func.value.id}.{node.func.attr}"
    return ""


def test_no_pickle_and_no_eval() -> None:
    nodes = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
    calls = [(path, node) for path, node in nodes if isinstance(node, ast.Call)]
    found = [f"{path.name}:{node.lineno}" for path, node in calls if called(node) in BANNED_NAMES | BANNED_CALLS]
    imports = [(path, node) for path, node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    found += [f"{path.name}:{node.lineno}" for path, node in imports if "pickle" in ast.unparse(node)]
    loads = [(path, node) for path, node in calls if called(node) in ("np.load", "numpy.load")]
    found += [f"{path.name}:{node.lineno}" for path, node in loads if "allow_pickle=False" not in ast.unparse(node)]
    assert not found


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_tree_in_the_readme_is_the_real_tree(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    block = next(part for part in text.split("```") if re.search(r"^fledge/$", part, re.M))
    listed = set(re.findall(r"^  ([a-z_]+(?:/|\.py))", block.split("fledge/\n", 1)[1], re.M))
    real = {f"{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    real |= {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    assert listed == real


def test_every_dependency_has_a_sentence() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    for requirement in {re.split(r"[<>=]", item)[0] for group in groups for item in group}:
        assert f"**{requirement}**" in page, f"{requirement} is not explained in docs/dependencies.md"


def test_the_command_table_imports_without_torch() -> None:
    program = "import sys, fledge.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
