"""What README, CONTRIBUTING and docs/ name is there: commands, flags, names, files, links. Each page's opening runs."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest

from llava_jax.cli import COMMANDS, add_command
from llava_jax.inference.llava import Llava

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llava_jax"
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *DOCS)
SCRIPTS = {"convert/from_hf.py": "convert", "convert/to_hf.py": "export", "convert/verify.py": "verify"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text):
    """What stands between ``` and ```."""
    return [body for _, body in BLOCK.findall(text)]


def spans(text):
    """What stands between ` and `, outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


# ---- what may be wrong with a page


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parser_of(command):
    parser = Parser(prog=command)
    add_command(parser, command)
    return parser


PARSERS = {command: parser_of(command) for command in COMMANDS}
FLAGS = {name: flags_in(parser.format_help()) for name, parser in PARSERS.items()}
OTHERS = {"--durations", "--log_samples", "--output_path", "--use_cache"}  # pytest's, lmms-eval's
OTHERS |= {"--api-nproc", "--key", "--local-media", "--model", "--verbose"}  # VLMEvalKit's
ANY_FLAG = set().union(*FLAGS.values(), OTHERS)


def wrong_commands(text):
    """Commands that are none, flags that they do not have; of a command in a block, whatever its parser refuses."""
    for code, whole in [(block, True) for block in blocks(text)] + [(span, False) for span in spans(text)]:
        for script, name in SCRIPTS.items():
            code = code.replace(f"python {script} ", f"llava-jax {name} ")
        for command in re.findall(r"\bllava-jax (\w[^'\n&|]*)", code):
            yield from wrong_command(command, whole)
        for script, rest in re.findall(r"\bpython (tests/[\w/]+\.py)(.*)", code):
            if (ROOT / script).is_file():
                source = read(script)
                yield from (f"{script}: has no {flag}" for flag in flags_in(rest) if f'"{flag}"' not in source)
        if code.startswith("--"):
            yield from (f"{flag}: no command has it" for flag in flags_in(code) - ANY_FLAG)


def wrong_command(command, whole):
    name, *words = shlex.split(command)
    if name not in PARSERS:
        yield f"{command}: no such command"
    elif unknown := flags_in(command) - FLAGS[name]:
        yield f"{command}: has no {', '.join(unknown)}"
    elif whole:
        try:
            PARSERS[name].parse_args(words)
        except ValueError as error:
            yield f"{command}: {error}"


def wrong_names(text):
    """What is imported from llava_jax, `llava_jax.name` and methods of `llava`, where there is none of the name."""
    code = [*blocks(text), *spans(text)]
    names = {name for part in code for name in re.findall(r"\bllava_jax(?:\.\w+)+", part)} - {"llava_jax.json"}
    python = [body for language, body in BLOCK.findall(text) if language == "python"] + HEREDOC.findall(text)
    for tree in map(ast.parse, python):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("llava_jax"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    yield from (f"{name}: no such name" for name in sorted(names) if locate(name) is None)
    for part in code:
        for name in re.findall(r"\bllava\.(\w+)\(|\bLlava\.(\w+)", part):
            if not hasattr(Llava, "".join(name)):
                yield f"Llava has no {''.join(name)}"


def wrong_paths(text):
    """Paths into this repository, or into llava_jax/, that lead nowhere; `path.py: name` where the file has no name."""
    folders = {".ci", "convert", "docs", "llava_jax", "notebooks", "tests"}  # what else lies in a clone is its user's
    folders |= {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    anywhere = {path.name for folder in (PACKAGE, ROOT / "tests", ROOT / "convert") for path in folder.rglob("*.py")}
    for code in [*blocks(text), *spans(text)]:
        for path in re.findall(r"(?<![\w./:~*-])[\w.-]+(?:/[\w.-]+)*/?(?![\w/*])", code):
            first, _, rest = path.partition("/")
            if first in folders and rest:
                found = (ROOT / path).exists() or (PACKAGE / path).exists()
            else:
                found = rest or not path.endswith(".py") or path in anywhere
            if not found:
                yield f"{path}: no such file"
        for path, names in re.findall(r"([\w/]+\.py): (\w+(?:, \w+)*)", code):
            file = next((folder / path for folder in (ROOT, PACKAGE) if (folder / path).is_file()), None)
            for name in names.split(", ") if file else ():
                if not re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", file.read_text("utf-8"), re.MULTILINE):
                    yield f"{path}: has no {name}"


def wrong_links(text, page):
    """Links to files that are not there, and to headings that no page has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if "://" in target:
            continue
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(text if not path else file.read_text("utf-8")):
            yield f"{target}: no such heading"


def anchors(text):
    """The headings, as a code host names them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong(text, page="README.md"):
    return [*wrong_commands(text), *wrong_names(text), *wrong_paths(text), *wrong_links(text, page)]


# ---- the pages


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    assert wrong(read(page), page) == []


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_a_notebooks_links_lead_somewhere(name):
    page = f"notebooks/{name}"
    assert list(wrong_links(read(page), page)) == []


def test_readme_is_short_and_leads_to_every_page():
    readme = read("README.md")
    assert len(readme.splitlines()) <= 180
    assert [page for page in DOCS if f"]({page})" not in readme] == []


@pytest.mark.parametrize(
    "text, fault",
    [
        ("`llava-jax asks`", "asks: no such command"),
        ("`llava-jax ask --picture a.jpg`", "has no --picture"),
        ("`python convert/verify.py model --slow`", "has no --slow"),
        ("```\nllava-jax ask --model-path model\n```\n", "required: --query"),
        ("```\nssh host --command='llava-jax web --port no'\n```\n", "invalid int value: 'no'"),
        ("`python tests/benchmarks/run.py decode --turn 3`", "has no --turn"),
        ("`--picture` names it", "--picture: no command has it"),
        ("`llava_jax.loads(directory)`", "llava_jax.loads: no such name"),
        ("```python\nfrom llava_jax.demo.scenes import paint\n```\n", "llava_jax.demo.scenes.paint: no such name"),
        ("```\npython - <<'END'\nfrom llava_jax.demo import no\nEND\n```\n", "llava_jax.demo.no: no such name"),
        ("`llava.generates(params)`", "Llava has no generates"),
        ("`tests/test_nothing.py`", "tests/test_nothing.py: no such file"),
        ("`models/nothing.py`", "models/nothing.py: no such file"),
        ("`nothing.py`", "nothing.py: no such file"),
        ("`models/vision.py: blur_tiles`", "models/vision.py: has no blur_tiles"),
        ("[there](docs/nothing.md)", "docs/nothing.md: no such file"),
        ("[there](docs/training.md#nothing)", "docs/training.md#nothing: no such heading"),
        ("[there](#nothing)", "#nothing: no such heading"),
    ],
)
def test_what_does_not_exist_is_found(text, fault):
    (found,) = wrong(text)
    assert fault in found


# ---- their openings

SAID = {  # what a page says that its opening prints
    "docs/capacity.md": "int8: 2,737,152 bytes",
    "docs/concepts.md": "inputs_embeds (1, ",
    "docs/converting.md": "llava_jax.json\n",
    "docs/evaluating.md": "gqa, 57 answers",
    "docs/exporting.md": "model: as the conversion wrote it",
    "docs/generating.md": "\nL4\n",
    "docs/harnesses.md": " of 57 answers are right\n",
    "docs/models.md": "description",
    "docs/serving.md": "the server has ended",
    "docs/training.md": "yellow cross\n",
    "docs/troubleshooting.md": "4. saved llava-jax-demo.png",
}


@pytest.mark.parametrize("page", DOCS)
def test_a_page_opens_with_commands(page):
    opening = re.match(r"# [^\n]+\n\n```\n(.*?)^```\n", read(page), re.MULTILINE | re.DOTALL)
    assert opening and opening[1].count(".venv/bin/") and page in SAID
    parsed = subprocess.run(["bash", "-n"], input=opening[1], text=True, capture_output=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.long  # two minutes of CPU time in all
@pytest.mark.parametrize("page", DOCS)
def test_an_opening_runs_in_a_clone(page, tmp_path, compiled):
    for name in ("llava_jax", "convert", "tests", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, call in {"python": "", "llava-jax": "-m llava_jax"}.items():
        script = tmp_path / ".venv/bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        script.chmod(0o755)
    env = {**os.environ, "LLAVA_JAX_CACHE_DIR": str(compiled)}
    command = ["bash", "-euo", "pipefail", "-c", blocks(read(page))[0]]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert SAID[page] in done.stdout
