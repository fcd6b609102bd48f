"""Who imports whom, read from the source; imports inside functions count, those for type checkers do not."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import llava_jax
from llava_jax.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ENGINE = {"config", "inputs", "parallel", "models", "checkpoint", "compiling", "inference"}
LAW = {  # CONTRIBUTING.md has it in words
    "config": set(),  # and what else stands beside it and is not named here
    "inputs": {"config"},
    "parallel": set(),
    "models": {"config", "inputs", "parallel"},
    "checkpoint": {"config", "inputs", "parallel", "models"},
    "compiling": {"config", "inputs"},
    "inference": ENGINE,
    "evaluation": ENGINE,
    "serve": ENGINE,
    "capacity": ENGINE | {"evaluation"},
    "plots": ENGINE,
    "conversion": ENGINE,
    "training": ENGINE - {"inference"} | {"conversion"},
    "demo": ENGINE | {"plots", "conversion", "training"},
    "web": ENGINE | {"demo"},
}


@cache
def trees(folder):
    """{module's name: its syntax tree}"""
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)}


def imports(tree):
    """Names of modules, and `module.name` for what is imported from one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


@cache
def imported_by():
    """{module: the modules of this package that it imports}"""
    found, modules = {}, trees("llava_jax")
    for module, tree in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imports(tree)}
        found[module] = names & modules.keys()
    return found


def package(module):
    name = module.removeprefix("llava_jax").strip(".").partition(".")[0]
    return name if name in ("", "__main__", "cli", *LAW) else "config"


def test_imports_run_one_way():
    """And nothing imports the command line."""
    law = LAW | {"cli": LAW.keys(), "__main__": {"cli"}}
    pairs = [(module, other) for module, others in imported_by().items() for other in others]
    between = [(module, other) for module, other in pairs if package(other) not in (package(module), "")]
    assert [(module, other) for module, other in between if package(other) not in law[package(module)]] == []


def test_no_modules_import_each_other():
    TopologicalSorter(imported_by()).prepare()  # CycleError names the circle


def test_no_two_modules_have_one_name():
    """But for the commands' own."""
    names = [module.rpartition(".")[2] for module in trees("llava_jax") if package(module) != "cli"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_jax_is_not_for_the_host_nor_argparse_for_libraries():
    named = {module: {name.partition(".")[0] for name in imports(tree)} for module, tree in trees("llava_jax").items()}
    assert {package(module) for module, names in named.items() if "argparse" in names} == {"cli"}
    host = [module for module in named if package(module) in ("inputs", "config")]
    assert [module for module in host if named[module] & {"jax", "flax", "orbax"}] == []


def kept(tree):
    """Names with an underscore that a module defines, its classes' attributes among them."""
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        name = getattr(node, "id", getattr(node, "attr", "")) if stored else getattr(node, "name", "")
        if name and name.startswith("_") and not name.endswith("__"):
            yield name


def read(tree):
    """Names that are looked up in something else, imported, or patched."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            yield from (str(getattr(word, "value", "")).rpartition(".")[2] for word in node.args[:2])


def test_nothing_reads_what_another_module_keeps_to_itself():
    ours = {name for tree in trees("llava_jax").values() for name in kept(tree)}
    everywhere = trees("llava_jax") | trees("convert") | trees("tests")
    found = {module: sorted(ours.intersection(read(tree)) - {*kept(tree)}) for module, tree in everywhere.items()}
    assert {module: names for module, names in found.items() if names} == {}


# ---- at the start of a process


def imported_after(code):
    """(what has been imported by then, of what this package has or is slow to import; what was printed)"""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    slow = {"jax", "flax", "orbax", "optax", "transformers", "torch", "matplotlib", "gradio", "PIL", "fsspec", "numpy"}
    return {name for name in done.stderr.split() if name in slow or name.startswith("llava_jax.")}, done.stdout


def test_the_package_and_its_help_import_next_to_nothing():
    assert imported_after("import llava_jax") == (set(), "")
    imported, said = imported_after("from llava_jax.cli import main; main(['--help'])")
    assert imported == {"llava_jax.cli", "llava_jax.cli.failures", "llava_jax.constants", "llava_jax.errors"}
    assert all(f"\n    {command} " in said for command in COMMANDS)


def test_drawing_imports_neither_jax_nor_matplotlib():
    assert imported_after("import llava_jax.plots.visualize")[0] & {"jax", "matplotlib"} == set()


def test_public_names_are_there():
    assert set(llava_jax.__all__) <= set(dir(llava_jax))
    assert [getattr(llava_jax, name).__name__ for name in llava_jax.__all__] == llava_jax.__all__
    assert not hasattr(llava_jax, "nobody")
