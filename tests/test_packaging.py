"""What is shipped, who may import whom, and how long files and functions are."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from dllm_compile import compat
from dllm_compile.runtime import lower

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dllm_compile"
COMPAT = PACKAGE / "compat.py"
BELOW_ALL_FLOORS = "dllm_compile.compat", "dllm_compile.debug"
LINES_OF_A_FUNCTION = 60


def files() -> list[Path]:
    """Every Python file of the product, once."""
    folders = ("", "core/", "interface/", "schedule/", "runtime/", "sampler/", "bench/", "tiny/")
    found = [path for folder in folders for path in PACKAGE.glob(f"{folder}*.py")]
    return sorted([*found, *(ROOT / "passes").glob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_of(path: Path) -> str:
    """The name a file is imported by."""
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    name = name if name.startswith("dllm_compile") else f"dllm_compile.{name}"
    return name.removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                up = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{up}.{base}" if base else up
            known = {module_of(other) for other in files()}
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names)


def ours(path: Path) -> list[str]:
    """Modules of the package that a file imports, but those below every floor."""
    return [name for name in imports(path) if within(name, "dllm_compile") and name not in BELOW_ALL_FLOORS]


def within(name: str, *floors: str) -> bool:
    return any(name == floor or name.startswith(f"{floor}.") for floor in floors)


def in_folder(name: str) -> list[Path]:
    return [path for path in files() if path.parent.name == name]


def ident(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- floors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", in_folder("core"), ids=ident)
def test_core_imports_core_alone(path: Path) -> None:
    assert [name for name in ours(path) if not within(name, "dllm_compile.core")] == []


@pytest.mark.parametrize("path", in_folder("kernels"), ids=ident)
def test_kernels_import_core_and_kernels_alone(path: Path) -> None:
    assert [name for name in ours(path) if not within(name, "dllm_compile.core", "dllm_compile.kernels")] == []


@pytest.mark.parametrize("path", in_folder("interface"), ids=ident)
def test_the_interface_imports_core_and_itself_alone(path: Path) -> None:
    assert [name for name in ours(path) if not within(name, "dllm_compile.core", "dllm_compile.interface")] == []


@pytest.mark.parametrize("path", [p for p in in_folder("passes") if p.name != "__init__.py"], ids=ident)
def test_passes_never_import_each_other(path: Path) -> None:
    below = "dllm_compile.core", "dllm_compile.kernels", "dllm_compile.interface"
    assert [name for name in ours(path) if not within(name, *below)] == []


@pytest.mark.parametrize("folder", ["schedule", "runtime"])
def test_no_method_is_chosen_above_the_schedules(folder: str) -> None:
    """What runs a step knows its row sets, and not the loop that generates with it, nor a command."""
    above = ("dllm_compile.sampler", "dllm_compile.bench", "dllm_compile.generate", "dllm_compile.backend")
    assert [(p.name, name) for p in in_folder(folder) for name in ours(p) if within(name, *above)] == []


@pytest.mark.parametrize("path", [*files(), *sorted((ROOT / "tests").glob("*.py"))], ids=ident)
def test_nobody_uses_the_short_names(path: Path) -> None:
    assert [name for name in imports(path) if within(name, "passes", "kernels")] == []


def test_the_import_reader_reads_every_spelling() -> None:
    """The floors above stand on it."""
    assert set(imports(ROOT / "passes" / "__init__.py")) >= {
        "dllm_compile.passes.normalize",
        "dllm_compile.core.axes",
        "torch.fx",
    }
    assert set(ours(PACKAGE / "runtime" / "program.py")) >= {
        "dllm_compile.core.axes",
        "dllm_compile.passes",
        "dllm_compile.runtime.cost",
    }
    assert "dllm_compile.core.rows" in ours(PACKAGE / "core" / "emit.py")  # from . import rows


# -- what is private of torch ------------------------------------------------------------------------------------------

NOT_OF_TORCH = {"_fields": "a named tuple", "_field_defaults": "a named tuple", "_replace": "a named tuple"}
NOT_OF_TORCH |= {"_getframe": "of sys"}


def is_private(name: str) -> bool:
    """Whether a dotted name of torch has an underscored part, or is of ``torch.fx.experimental``."""
    parts = name.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "torch" and (private or name.startswith("torch.fx.experimental"))


def private_names(source: str) -> Iterator[str]:
    """Private names of torch in a file: imported, looked up in anything that is not the file's own, or given as text.

    ``aten._to_copy`` and the like are operations, which have no other name.
    """
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(f"torch.{node.attr}"):
            of = ast.unparse(node.value)
            if of not in ("self", "cls", "aten", "torch.ops.aten") and node.attr not in own | NOT_OF_TORCH.keys():
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and is_private(f"torch.{a.value}"))
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch(\.\w+)+", str(node.value)):
            yield from [node.value] * is_private(node.value)


@pytest.mark.parametrize("path", [path for path in files() if path != COMPAT], ids=ident)
def test_private_names_of_torch_are_in_one_file(path: Path) -> None:
    assert list(private_names(path.read_text())) == []


def test_nothing_is_below_what_is_below_all_floors() -> None:
    assert [ours(PACKAGE / f"{name.rpartition('.')[2]}.py") for name in BELOW_ALL_FLOORS] == [[], []]
    assert [name for name in imports(COMPAT) if within(name, "dllm_compile")] == []


def test_the_reader_of_private_names_reads_every_spelling() -> None:
    lines = ["import torch._dynamo", "from torch import _guards", "from torch._C import _functorch as f"]
    lines += ["from torch.fx.experimental import symbolic_shapes", "torch._C", "x.storage()._cdata"]
    lines += ['getattr(func, "_schema", None)', 'getLogger("torch._library")']
    assert [line for line in lines if not list(private_names(line))] == []
    fine = ["import torch.fx", "from ._x import y", "self._x", "aten._to_copy", "x.__class__", "'see torch._C'"]
    assert [line for line in fine if list(private_names(line))] == []


SHARED_WITH_METHODS = ("emit", "emit_attention", "assignment", "rows", "state")  # they name the row sets of methods


@pytest.mark.parametrize("path", in_folder("core"), ids=ident)
def test_core_knows_nothing_of_diffusion(path: Path) -> None:
    words = r"mask_id|denois\w*|diffusion|unmask\w*|samplers?|decod\w*|DyLLM|Sparse"
    if path.stem not in SHARED_WITH_METHODS:
        words += r"|prompts?|responses?|salien\w*|evict\w*|blocks?"
    assert re.findall(rf"\b(?:{words})\b", path.read_text()) == []


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in files() if not p.stem.endswith("_triton")], ids=ident)
def test_functions_are_short(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_FUNCTION} == {}


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: an sdist holds no links")
@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_the_folders_in_front_are_linked_into_the_package(name: str) -> None:
    assert os.readlink(PACKAGE / name) == f"../{name}"
    shown = ["git", "-C", str(ROOT), "ls-files", "-s", f"dllm_compile/{name}"]
    assert subprocess.run(shown, capture_output=True, text=True, check=True).stdout.startswith("120000 ")


SHIPPED = "dllm_compile", "passes", "kernels", "tests", "docs", "examples", "records"
PAPERS = "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "MANIFEST.in", ".mkdocs.yml"


def shipped() -> Iterator[Path]:
    """Every file that an sdist should hold, by its path here; folders that are links are not followed."""
    yield from (ROOT / name for name in PAPERS)
    for folder, inner, names in (each for name in SHIPPED for each in os.walk(ROOT / name)):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        yield from (Path(folder, name) for name in names)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, built outside of this checkout from what it should hold, and unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in shipped():
        to = source / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    (built,) = build("sdist", source, out)
    shutil.unpack_archive(built, out)
    return built.with_name(built.name.removesuffix(".tar.gz"))


def build(kind: str, source: Path, out: Path) -> list[Path]:
    """What setuptools makes of a folder, if it warns of nothing."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]
    assert [line for line in said if "byte-compiling is disabled" not in line] == []  # by who runs the tests
    return [*out.glob("*.whl" if kind == "wheel" else "*.tar.gz")]


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Names and contents of a wheel, built from the sdist."""
    (built,) = build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))
    with zipfile.ZipFile(built) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_sdist_holds_the_tests_with_all_they_read(unpacked: Path) -> None:
    wanted = {path.relative_to(ROOT) for path in shipped()}
    assert {path.name for path in wanted} >= {"sampling_loops.py", "guard.cpp", "pyproject.toml"}
    assert sum(path.suffix == ".safetensors" for path in wanted) > 50
    assert wanted - {path.relative_to(unpacked) for path in unpacked.rglob("*")} == set()


@pytest.mark.parametrize("text", [False, True], ids=["sdist", "windows"])
def test_the_package_runs_where_there_are_no_links(unpacked: Path, text: bool, tmp_path: Path) -> None:
    """On Windows git writes a file in place of a link, with where it leads to."""
    for name in ("dllm_compile", "passes", "kernels"):
        shutil.copytree(unpacked / name, tmp_path / name)
    for name in ("passes", "kernels") if text else ():
        (tmp_path / "dllm_compile" / name).write_text(f"../{name}")
    code = """
import dllm_compile.passes, dllm_compile.kernels, dllm_compile.runtime.lower, dllm_compile.__main__
print(dllm_compile.passes.__file__, dllm_compile.kernels.__file__, dllm_compile.runtime.lower._SOURCE)
dllm_compile.__main__.main(["--help"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *found, source = done.stdout.splitlines()[0].split()
    assert found == [str(tmp_path / name / "__init__.py") for name in ("passes", "kernels")]
    assert source == lower._SOURCE


def test_the_wheel_says_whose_and_what_it_is(wheel: dict[str, bytes]) -> None:
    (text,) = (content for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(text)
    assert all(said[name] for name in ("Author", "Keywords", "Summary", "Project-URL", "License-Expression"))
    versions = [each.rpartition(" ")[2] for each in said.get_all("Classifier") if ":: Python :: 3." in each]
    allowed = SpecifierSet(said["Requires-Python"])
    least = next(minor for minor in range(30) if f"3.{minor}" in allowed)
    assert versions == [f"3.{minor}" for minor in range(least, least + len(versions))]


def test_the_wheel_holds_every_product_file_once(wheel: dict[str, bytes]) -> None:
    wanted = {module_of(path) for path in files()}
    held = [n.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for n in wheel if n.endswith(".py")]
    assert sorted(held) == sorted(wanted)


def test_the_wheel_holds_types_and_weights(wheel: dict[str, bytes]) -> None:
    assert "dllm_compile/py.typed" in wheel
    weights = {f"dllm_compile/tiny/weights/{path.name}" for path in (PACKAGE / "tiny" / "weights").iterdir()}
    assert any(name.endswith(".safetensors") for name in weights)
    assert weights <= wheel.keys()


def test_the_wheel_names_the_backend_and_the_license(wheel: dict[str, bytes]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
    assert any(name.endswith("/LICENSE") for name in wheel)


# -- how it is found ---------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    """What a fresh process prints, away from this checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(sys.prefix), env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_backend_is_listed() -> None:
    assert "dllm" in torch.compiler.list_backends()


def test_the_backend_is_found_without_importing_us_and_runs_without_what_may_be_missing() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = sys.modules["safetensors"] = None
import torch
model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).eval()
assert not any(name.split(".")[0] == "dllm_compile" for name in sys.modules)
call = torch.compile(model, backend="dllm", options={"lowering": "eager", "mask_id": 8})
ids = torch.tensor([[1, 2, 8, 8]])
with torch.no_grad():
    print(torch.equal(call(ids), model(ids)), "dllm_compile.backend" in sys.modules)
"""
    assert run(code).split() == ["True", "True"]


def test_dynamo_and_inductor_are_imported_by_what_is_compiled() -> None:
    code = """
import sys, torch
before = {*sys.modules}
import dllm_compile
print(*({"torch._dynamo", "torch._inductor"} & {*sys.modules} - before))
model = torch.compile(torch.nn.Embedding(9, 4), backend="dllm", options={"lowering": "eager", "mask_id": 8})
with torch.no_grad():
    print(tuple(model(torch.tensor([[1, 2, 8, 8]])).shape))
"""
    assert run(code).split("\n") == ["", "(1, 4, 4)", ""]


def test_what_is_imported_late_is_there() -> None:
    assert {name for name in compat.LATE if not hasattr(compat, name)} == set()
    assert compat.LATE.keys() <= compat.__annotations__.keys()
    with pytest.raises(AttributeError, match="no attribute 'compile'"):
        compat.compile()


PAGES = [page for folder in (".", "docs", "records") for page in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not lost
