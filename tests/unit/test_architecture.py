"""The architecture: imports point one way, each heavy package has a home, files and functions stay small."""

from __future__ import annotations

import ast
import functools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bpt_dist"
FILES = sorted(path for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launcher").rglob("*.py")])

# A package imports packages of strictly lower lines. Packages of one line do not know each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "svgd", "objective"}),
    frozenset({"storage", "distributed"}),
    frozenset({"tasks"}),
    frozenset({"config"}),
    frozenset({"data", "backbones", "tracking"}),
    frozenset({"methods"}),
    frozenset({"artifacts"}),
    frozenset({"training"}),
    frozenset({"train"}),
    frozenset({"commands"}),
    frozenset({"library"}),
    frozenset({"launcher"}),
)
# Where a heavy package may be imported: a file or a folder. All other code calls these.
HOMES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("training/sharding/zero.py", "commands/check/machine.py"),
    "mlflow": ("tracking/",),
    "ray": ("commands/sweep/",),
    "peft": ("artifacts/peft_export.py", "commands/bench/baselines.py", "library/bridge.py"),
    "transformers": ("backbones/", "tasks/mini/pretrain.py", "tasks/mini/tokenizer.py", "commands/bench/", "commands/convert/"),
    "gguf": ("commands/convert/",),
    "fastapi": ("commands/serve/",),
    "uvicorn": ("commands/serve/",),
    "prometheus_client": ("commands/serve/",),
    "datasets": ("data/published.py",),
    "matplotlib": ("artifacts/figures.py", "artifacts/curves.py", "commands/example.py", "commands/sweep/report.py"),
    "sklearn": ("artifacts/figures.py", "tasks/metrics.py"),
    "scipy": ("tasks/metrics.py", "commands/example.py", "commands/table/statistics.py"),
}
# What the names of `bpt_dist` itself come from, imported when one of them is used.
FACE = {"library", "train", "errors", "storage"}
PURE = ("svgd.py", "objective.py")
# What a configuration error and `--help` need: they are answered within a second, without torch.
LIGHT = ("errors.py", "config/", "tasks/spec.py", "tasks/catalogue.py", "tasks/user_tasks.py", "tasks/mini/world.py",
         "distributed/environment.py", "storage/", "commands/main.py", "commands/output.py",
         "commands/train.py", "commands/configs.py", "launcher/", "__init__.py", "library/page.py",
         "library/runs.py", "library/task.py", "library/training.py")  # fmt: skip
HEAVY = {"torch", "numpy", *HOMES}
HEAVY_STORAGE = ("storage/checkpoint.py", "storage/digest.py", "storage/snapshots.py")  # tensors
BY_TEXT = ("import_module", "__import__", "resolve_name", "spec_from_file_location", "runpy")  # ways to import a name in a string
MOST_MODULES = 18  # in a folder
ENTRIES = {"train.py", "svgd.py", "objective.py", "errors.py", "config", "tasks", "data", "backbones", "distributed", "storage",
           "methods", "artifacts", "tracking", "training", "commands", "library"}  # fmt: skip


def place(path: Path) -> str:
    """Return a file's path inside the package, or inside the repository for files outside the package."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements_at_import(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: no bodies of functions, nothing for type checkers only."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        yield node
        yield from statements_at_import(ast.iter_child_nodes(node))


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Yield the dotted names a file imports: also late, for types only, and by `importlib.import_module("...")`."""
    for node in statements_at_import(tree(path).body) if at_import_only else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            text = name.values[0] if isinstance(name, ast.JoinedStr) else name
            assert isinstance(text, ast.Constant), f"{path}:{node.lineno}: imports a name that is known at run time only"
            yield str(text.value).rstrip(".")


@functools.cache
def edges(path: Path, *, at_import_only: bool = False) -> frozenset[str]:
    """Return the modules of the project that a file imports."""
    modules_imported = set()
    for name in imports(path, at_import_only=at_import_only):
        parts = name.split(".")
        modules = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
        modules_imported |= {next((module for module in modules if module in MODULES), "")}
    return frozenset(modules_imported - {"", module_name(path)})


def loaded_with(path: Path) -> set[Path]:
    """Return the files of the project that importing a file runs, itself included."""
    loaded, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file not in loaded:
            loaded.add(file)
            waiting += [MODULES[name] for name in edges(file, at_import_only=True)]
    return loaded


def package(module: str) -> str:
    """Return the package, or the module at the top, that a module belongs to; "" for `bpt_dist` itself."""
    parts = module.split(".")
    return parts[0] if parts[0] == "launcher" else ".".join(parts[1:2])


def layer(module: str) -> int:
    numbers = [number for number, names in enumerate(LAYERS) if package(module) in names]
    assert numbers, f"{module} has no layer: add its package to LAYERS"
    return numbers[0]


def belongs(path: Path, places: Iterable[str]) -> bool:
    return any(place(path) == home or (home.endswith("/") and place(path).startswith(home)) for home in places)


def test_the_top_of_the_package_is_four_modules_and_twelve_packages() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")}
    assert entries == ENTRIES


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_between_packages_point_down(path: Path) -> None:
    module = module_name(path)
    if package(module) == "":
        assert not edges(path, at_import_only=True), "importing bpt_dist imports nothing else"
        assert {package(other) for other in edges(path)} <= FACE, "its names are those of the library"
        return
    for other in edges(path):
        if package(other) != package(module):
            assert layer(other) < layer(module), f"{module} imports {other}, which is not below it"


def test_no_imports_form_a_circle() -> None:
    """Inside a package, too; imports for types only and late imports count."""
    waiting = {name: edges(path) for name, path in MODULES.items() if package(name)}
    while free := {name for name, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert not waiting, f"these are in a circle or import one that is: {sorted(waiting)}"


def test_a_command_imports_no_other_command() -> None:
    """The exceptions: all may import `output`, `train --plan` prints what `plan` prints, and `main` imports all."""
    for name, path in MODULES.items():
        command = name.split(".")[2:3]
        if package(name) != "commands" or not command or command == ["main"]:
            continue
        for other in edges(path):
            if package(other) == "commands":
                allowed = (command, ["output"], *([["plan"]] if command == ["train"] else []))
                assert other.split(".")[2:3] in allowed, f"{name} imports {other}"


def test_names_are_imported_by_text_in_one_place_only() -> None:
    users = {place(path) for path in FILES if any(way in path.read_text() for way in BY_TEXT)}
    assert users == {"methods/base.py"}


@pytest.mark.parametrize("name", HOMES)
def test_heavy_packages_are_imported_in_their_homes_only(name: str) -> None:
    for path in FILES:
        if any(imported.split(".")[0] == name for imported in imports(path)):
            assert belongs(path, HOMES[name]), f"{place(path)} imports {name}"


@pytest.mark.parametrize("name", PURE)
def test_mathematics_is_pure(name: str) -> None:
    for imported in imports(PACKAGE / name):
        assert not imported.startswith(("bpt_dist", "torch.distributed")), imported


@pytest.mark.parametrize("home", LIGHT)
def test_light_modules_import_nothing_heavy(home: str) -> None:
    """Neither directly nor, but for numpy (a tenth of a second), through another module of the project."""
    files = [path for path in FILES if belongs(path, [home]) and not belongs(path, HEAVY_STORAGE)]
    assert files
    for path in files:
        for loaded in loaded_with(path):
            heavy = {imported.split(".")[0] for imported in imports(loaded, at_import_only=True)} & HEAVY
            heavy -= {"numpy"} if loaded != path else set()
            assert not heavy, f"importing {place(path)} imports {place(loaded)}, which imports {heavy}"


def test_a_package_face_is_a_docstring() -> None:
    """One import path for every name: only `config` hands names on, the mini world its two places, `bpt_dist` the library's."""
    faces = ("__init__.py", "config/__init__.py", "tasks/mini/__init__.py")
    for path in FILES:
        if path.name == "__init__.py" and place(path) not in faces:
            body = tree(path).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_a_folder_can_be_read_at_a_glance() -> None:
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    crowded = {folder: number for folder, number in folders.items() if number > MOST_MODULES}
    assert not crowded


def test_no_method_is_named_outside_its_file() -> None:
    names = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__", "base"}
    # The published wording of the tasks is named after the paper whose data code it repeats, and so is that paper's method.
    protocol_files = {PACKAGE / "config" / "sections.py", *(PACKAGE / "data").glob("*.py"), *(PACKAGE / "tasks").glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "methods" or path.stem == "published":
            continue
        strings = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        named = strings & (names - {"attempt"} if path in protocol_files else names)
        assert not named, f"{path} names {named}"


def test_unit_tests_mirror_the_packages() -> None:
    """`tests/unit/<package>/test_*.py` imports something of that package, and every folder has a package."""
    unit = ROOT / "tests" / "unit"
    for path in unit.rglob("test_*.py"):
        folder = path.parent.relative_to(unit)
        if folder in (Path(), Path("launcher")):
            continue
        assert (PACKAGE / folder).is_dir(), f"{path}: there is no package {folder}"
        text, dotted = path.read_text(), ".".join(folder.parts)
        parent = ".".join(folder.parts[:-1])  # its face may be the only way to what is tested: a command through `main`
        assert (
            f"bpt_dist.{dotted}" in text
            or (parent and f"from bpt_dist.{parent} import" in text)
            or folder.parts[0] in ("methods", "config")
            or "tiny_run" in text
        ), f"{path} tests nothing of {dotted}"


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_files_and_functions_stay_small() -> None:
    lines = {path: path.read_text().count("\n") for path in FILES if path.name != "__init__.py"}
    assert max(lines.values()) <= 500, max(lines, key=lambda path: lines[path])
    assert statistics.median(lines.values()) <= 250
    sizes = sorted((node.end_lineno or 0) - node.lineno + 1 for _, node in functions())
    assert statistics.median(sizes) <= 12
    assert sizes[int(0.95 * len(sizes))] <= 45
    assert sizes[-1] <= 80


def test_public_functions_are_annotated_and_documented() -> None:
    missing, undocumented, total = [], [], 0
    for path, node in functions():
        if node.name.startswith("_"):
            continue
        total += 1
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if not node.returns or any(a.annotation is None for a in arguments if a.arg not in ("self", "cls")):
            missing.append(f"{path.stem}.{node.name}")
        if not ast.get_docstring(node):
            undocumented.append(f"{path.stem}.{node.name}")
    assert not missing
    assert len(undocumented) <= 0.1 * total, undocumented


@pytest.mark.parametrize("path", FILES, ids=place)
def test_nothing_is_unpickled(path: Path) -> None:
    assert "pickle" not in {name.split(".")[0] for name in imports(path)}
    assert not {"torch.load", "torch.save", "yaml.load"} & set(imports(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "yaml.load", "os.system", "eval"), f"{path}:{node.lineno} {called}"
