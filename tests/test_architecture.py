"""The house stands: imports point upstream, Flax stays out, rooms stay small, shells stay thin."""

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

# The rooms in the order in which data goes through them; each imports earlier ones only.
ROOMS = [
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
# And the files of the core.
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
SHELLS = ["linen", "nnx"]


def rooms(package=PACKAGE):
    """The source of each room; a room is a file or a folder of files.

    What the front door imports for type checkers alone is no import: it opens on first use.
    """
    files = {path.stem: path.read_text() for path in package.glob("*.py")}
    files["__init__"] = re.sub(r"(?s)\nif TYPE_CHECKING:.*?\nelse:", "\nif 1:", files["__init__"])
    folders = {path.parent.name for path in package.glob("*/*.py")}
    return files | {
        name: "\n".join(path.read_text() for path in sorted((package / name).rglob("*.py")))
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
                found.add(parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__")
    return found


def back_arrows(sources):
    """Imports of a later room, or of itself where the room is one file."""
    found = []
    for room, source in sources.items():
        allowed = ROOMS.index(room) + (PACKAGE / room).is_dir()
        found += [(room, to) for to in imports(source) if ROOMS.index(to) >= allowed]
    return found


def arithmetic(source):
    """Lines of a shell with an operator other than comparison, or a call of jax.numpy or lax.

    jnp.asarray carries a value in, jnp.float32 and its like name a dtype.
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


def test_every_room_is_on_the_plan():
    assert sorted(rooms()) == sorted(ROOMS)


def test_imports_point_upstream():
    assert not back_arrows(rooms())


def test_a_back_arrow_would_be_found():
    sources = rooms()
    for planted in (
        "from normjax._functions import batch_norm",
        "from normjax import linen",
        "import normjax.linen",
        "def f():\n    from normjax import _functions",
    ):
        assert back_arrows({**sources, "_stats": sources["_stats"] + "\n" + planted})


def core_imports(source):
    """The files of the core that a source imports."""
    return set(re.findall(r"normjax\._core\.(\w+)", source)) | set(
        re.findall(r"from normjax\._core import (\w+)", source)
    )


def test_imports_within_the_core_point_upstream():
    files = rooms(PACKAGE / "_core")
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


def test_importing_normjax_leaves_flax_unloaded():
    assert not loads_flax("import normjax")


def test_loading_flax_would_be_found():
    assert loads_flax("import normjax.linen")
    assert loads_flax("import normjax.nnx")


def test_the_rooms_of_flax_open_on_first_use():
    code = (
        "import sys, normjax\n"
        "assert {'linen', 'nnx', 'surgery'} <= set(dir(normjax)) and 'flax' not in sys.modules\n"
        "assert normjax.linen is sys.modules['normjax.linen'] is normjax.linen\n"
        "assert normjax.nnx is sys.modules['normjax.nnx'] is normjax.nnx\n"
        "assert normjax.surgery.freeze"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0


def test_an_unknown_name_of_the_front_door_is_an_error():
    with pytest.raises(AttributeError, match="'normjax' has no attribute 'torch'"):
        normjax.torch  # noqa: B018


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_hold_no_arithmetic(shell):
    assert not arithmetic(rooms()[shell])


def test_arithmetic_would_be_found():
    for planted in ("y = x * 2", "x += 1", "y = jnp.mean(x)", "y = lax.rsqrt(x)"):
        assert arithmetic(planted)
    assert not arithmetic("x: int | None = None\ny = jnp.asarray(x)\nz = x == y")


def test_there_is_one_rsqrt():
    assert [room for room, source in rooms().items() if "rsqrt(" in source] == ["_core"]


def test_no_room_is_too_large():
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: size for path, size in sizes.items() if size > 400}


def test_the_oracle_knows_nothing_of_jax_or_normjax():
    tree = ast.parse((PACKAGE.parent / "tests" / "reference.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"numpy", "typing"}


DOORS = (normjax, normjax.linen, normjax.nnx, normjax.surgery)
PUBLIC = {name for door in DOORS for name in door.__all__}


def parameters(source):
    """The names of the parameters of each function of a source."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    for function in functions:
        given = function.args
        named = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
        yield function.name, [arg.arg for arg in named if arg is not None]


def handed_down(source):
    """Functions beside the door that are told what the user called."""
    return [name for name, given in parameters(source) if "called" in given and name != "named"]


def crowded(source):
    """Private functions of more than eight parameters: what belongs together travels together."""
    return [name for name, given in parameters(source) if name not in PUBLIC and len(given) > 8]


@pytest.mark.parametrize("room", ROOMS)
def test_what_was_called_is_known_at_the_door_alone(room):
    assert not handed_down(rooms()[room])


def test_a_name_that_is_handed_down_would_be_found():
    assert handed_down("def mask(called, value): ...") == ["mask"]
    assert handed_down("def door():\n    def inner(x, *, called): ...") == ["inner"]


@pytest.mark.parametrize("room", ROOMS)
def test_private_functions_take_few_parameters(room):
    assert not crowded(rooms()[room])


def test_a_private_function_of_many_parameters_would_be_found():
    assert crowded("def _run(a, b, c, d, /, e, f, *g, h, **i): ...") == ["_run"]
    assert not crowded("def _run(a, b, c, d, e, f, g, h): ...")
    assert not crowded("def batch_norm(a, b, c, d, e, f, g, h, i): ...")


def own_calls(function):
    """How often each function of normjax is called, by Python's own count."""
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
def test_a_call_by_itself_takes_few_calls_of_python(train):
    """An option that is checked twice shows here, and arithmetic that is not compiled."""
    x, scale, bias = jnp.ones((8, 4)), jnp.ones(4), jnp.zeros(4)
    stats = normjax.BatchStats.make(4)

    def step():
        normjax.batch_norm(x, stats, scale, bias, train=train)

    # The first call traces.
    step()
    found = own_calls(step)
    assert found["/_functions/batch.py:batch_norm"] == 1
    assert found.total() <= 47, found
