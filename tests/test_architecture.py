"""Architecture: imports point upstream, normjax does not load Flax, adapters have no arithmetic."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest

import normjax
import normjax.linen
import normjax.nnx
import normjax.surgery

PACKAGE = Path(__file__).parents[1] / "normjax"

# The modules and packages of normjax, from upstream to downstream; each imports only earlier ones.
PACKAGES = [
    "_errors",
    "_core",
    "_choose",
    "_stats",
    "_functions",
    "_modules",
    "__init__",
    "__main__",
    "linen",
    "nnx",
    "surgery",
]
# The files of the core, in the same order.
CORE = [
    "dtypes",
    "mask",
    "lowering",
    "algorithms",
    "platforms",
    "linear",
    "remat",
    "devices",
    "moments",
    "measure",
    "normalize",
    "standardize",
]
ADAPTERS = ["linen", "nnx"]


def sources(folder=PACKAGE):
    """The source of each module, and of each package as one text.

    Imports of `__init__` for type checkers only are left out: it imports those names on first use.
    """
    files = {path.stem: path.read_text() for path in folder.glob("*.py")}
    files["__init__"] = re.sub(r"(?s)\nif TYPE_CHECKING:.*?\nelse:", "\nif 1:", files["__init__"])
    folders = {path.parent.name for path in folder.glob("*/*.py")}
    return files | {
        name: "\n".join(path.read_text() for path in sorted((folder / name).rglob("*.py")))
        for name in folders
    }


def imports(source):
    """The modules of normjax that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "normjax":
                found.add(parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "__init__")
    return found


def downstream_imports(sources):
    """Imports of a later module or package, or of itself where it is one file."""
    found = []
    for name, source in sources.items():
        allowed = PACKAGES.index(name) + (PACKAGE / name).is_dir()
        found += [(name, to) for to in imports(source) if PACKAGES.index(to) >= allowed]
    return found


def arithmetic(source):
    """Lines with an operator other than comparison, or a call of jax.numpy or lax.

    jnp.asarray only converts a value, and jnp.float32 only names a dtype.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        annotation = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and not annotation:
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            calls_math = isinstance(owner, ast.Name) and owner.id in ("jnp", "lax")
            if calls_math and node.func.attr != "asarray":
                lines.append(node.lineno)
    return lines


def test_every_package_is_listed():
    assert sorted(sources()) == sorted(PACKAGES)


def test_imports_point_upstream():
    assert not downstream_imports(sources())


def test_a_downstream_import_would_be_found():
    correct = sources()
    for fault in (
        "from normjax._functions import batch_norm",
        "from normjax import linen",
        "import normjax.linen",
        "def f():\n    from normjax import _functions",
    ):
        assert downstream_imports({**correct, "_stats": correct["_stats"] + "\n" + fault})


def core_imports(source):
    """The files of the core that a source imports."""
    return set(re.findall(r"normjax\._core\.(\w+)", source)) | set(
        re.findall(r"from normjax\._core import (\w+)", source)
    )


def test_imports_within_the_core_point_upstream():
    files = sources(PACKAGE / "_core")
    assert set(files) == {*CORE, "__init__"}
    for name in CORE:
        # A folder may import from itself.
        later = CORE[CORE.index(name) + (name == "platforms") :]
        assert not core_imports(files[name]) & set(later), name


def loads_flax(statement):
    code = f"import sys\n{statement}\nsys.exit('flax' in sys.modules)"
    return (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=PACKAGE.parent).returncode
        == 1
    )


def test_importing_normjax_does_not_load_flax():
    assert not loads_flax("import normjax")


def test_loading_flax_would_be_found():
    assert loads_flax("import normjax.linen")
    assert loads_flax("import normjax.nnx")


def test_modules_that_need_flax_are_imported_on_first_use():
    code = (
        "import sys, normjax\n"
        "assert {'linen', 'nnx', 'surgery'} <= set(dir(normjax)) and 'flax' not in sys.modules\n"
        "assert normjax.linen is sys.modules['normjax.linen'] is normjax.linen\n"
        "assert normjax.nnx is sys.modules['normjax.nnx'] is normjax.nnx\n"
        "assert normjax.surgery.freeze"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0


def test_an_unknown_attribute_of_normjax_is_an_error():
    with pytest.raises(AttributeError, match="'normjax' has no attribute 'torch'"):
        normjax.torch  # noqa: B018


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_contain_no_arithmetic(adapter):
    assert not arithmetic(sources()[adapter])


def test_arithmetic_would_be_found():
    for fault in ("y = x * 2", "x += 1", "y = jnp.mean(x)", "y = lax.rsqrt(x)"):
        assert arithmetic(fault)
    assert not arithmetic("x: int | None = None\ny = jnp.asarray(x)\nz = x == y")


def test_only_the_core_calls_rsqrt():
    assert [name for name, source in sources().items() if "rsqrt(" in source] == ["_core"]


def test_no_file_is_too_large():
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: size for path, size in sizes.items() if size > 400}


def test_the_oracle_imports_neither_jax_nor_normjax():
    tree = ast.parse((PACKAGE.parent / "tests" / "reference.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"numpy", "typing"}


PUBLIC_MODULES = (normjax, normjax.linen, normjax.nnx, normjax.surgery)
PUBLIC = {name for module in PUBLIC_MODULES for name in module.__all__}


def parameters(source):
    """The names of the parameters of each function of a source."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    for function in functions:
        given = function.args
        named = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
        yield function.name, [arg.arg for arg in named if arg is not None]


def functions_with_called(source):
    """Functions with a parameter `called`; only the decorator `named` may have it."""
    return [name for name, given in parameters(source) if "called" in given and name != "named"]


def functions_of_many_parameters(source):
    """Private functions of more than eight parameters, some of which should be one object."""
    return [name for name, given in parameters(source) if name not in PUBLIC and len(given) > 8]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_name_of_the_called_function_is_no_parameter(package):
    assert not functions_with_called(sources()[package])


def test_a_parameter_called_would_be_found():
    assert functions_with_called("def mask(called, value): ...") == ["mask"]
    nested = "def outer():\n    def inner(x, *, called): ..."
    assert functions_with_called(nested) == ["inner"]


@pytest.mark.parametrize("package", PACKAGES)
def test_private_functions_take_few_parameters(package):
    assert not functions_of_many_parameters(sources()[package])


def test_a_private_function_of_many_parameters_would_be_found():
    assert functions_of_many_parameters("def _run(a, b, c, d, /, e, f, *g, h, **i): ...") == [
        "_run"
    ]
    assert not functions_of_many_parameters("def _run(a, b, c, d, e, f, g, h): ...")
    assert not functions_of_many_parameters("def batch_norm(a, b, c, d, e, f, g, h, i): ...")


def own_calls(function):
    """How often Python calls each function of normjax."""
    found = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            place = frame.f_code.co_filename.removeprefix(str(PACKAGE))
            found[f"{place}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("train", [True, False])
def test_an_eager_call_makes_few_python_calls(train):
    """This finds options that are checked twice, and arithmetic that is not compiled."""
    x, scale, bias = jnp.ones((8, 4)), jnp.ones(4), jnp.zeros(4)
    stats = normjax.BatchStats.make(4)

    def step():
        normjax.batch_norm(x, stats, scale, bias, train=train)

    # The first call traces.
    step()
    found = own_calls(step)
    assert found["/_functions/batch.py:batch_norm"] == 1
    assert found.total() <= 47, found
