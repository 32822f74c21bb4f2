"""How the package is built, by its syntax trees: arrows one way, no private name from elsewhere, files of a size."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pp_diffusion"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

ROOMS = (  # from the ground up: a room may use itself and those before it
    ("archives", "checks", "compiling", "divergence", "frozen", "inference_data", "levels"),
    ("matrices", "rules", "sharding", "solvers", "uncomputed", "units", "version"),
    ("contexts", "covariates", "datasets", "networks", "schedules", "transforms"),
    ("states",),
    ("kernels",),
    ("data_space", "last_step", "reverse", "chain", "objectives", "trajectories"),
    ("prior",),
    ("rows", "bounds", "entropies", "weights", "likelihood", "plotting"),
    ("probability_flow", "flow"),
    ("recipe", "diffusion", "training", "saving"),
    ("posterior", "smc", "tempered", "twists"),
    ("",),
)


def floor_of(name):
    """Of the room that a module is in, by the part of its name after the package's."""
    room = [*name.split("."), ""][1]
    found = [floor for floor, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"no room is stated for {name}"
    return found[0]


def module_of(name):
    """The module in which a dotted name lives: the name itself, or what it is imported from."""
    return name if name in FILES else name.rpartition(".")[0]


def imports(name):
    """``(module, imported name or None, local name)`` for all imports: within functions, for types only, by string."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                yield source, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, None, argument.value


def arrows():
    graph = {name: set() for name in FILES}
    for name in FILES:
        for source, imported, _ in imports(name):
            if source.split(".")[0] == "pp_diffusion":
                graph[name].add(module_of(f"{source}.{imported}" if imported else source))
    return graph


def is_private(name):
    """``_replace`` and its like are a named tuple's public names, so that fields may have any."""
    return name.startswith("_") and not name.endswith("__") and name not in ("_replace", "_asdict", "_fields")


def test_no_circle():
    """Not one of imports for types only, within functions or by strings either."""
    list(TopologicalSorter(arrows()).static_order())  # raises, and names the circle


def test_arrows_point_down():
    up = [(name, used) for name, all_used in arrows().items() for used in all_used if floor_of(used) > floor_of(name)]
    assert not up


def test_imports_by_string_and_within_functions_are_seen(monkeypatch):
    source = """
if TYPE_CHECKING:
    from . import units
def f():
    from pp_diffusion.frozen import Frozen
    import pp_diffusion.prior
    return importlib.import_module("pp_diffusion.chain"), __import__("pp_diffusion")
"""
    monkeypatch.setitem(TREES, "pp_diffusion.checks", ast.parse(source))
    expected = {"units", "frozen", "prior", "chain"}
    assert arrows()["pp_diffusion.checks"] == {f"pp_diffusion.{name}" for name in expected} | {"pp_diffusion"}
    with pytest.raises(ValueError, match="cycle"):
        test_no_circle()


def test_private_names_stay_at_home():
    """None is imported, none is read from a module or a class that was imported, none of another's objects is read."""
    found = defaultdict(set)
    for name, tree in TREES.items():
        ours = {local for source, _, local in imports(name) if source.split(".")[0] == "pp_diffusion"}
        for source, imported, _ in imports(name):
            if any(is_private(part) for part in f"{source}.{imported or ''}".split(".")):
                found[name].add(f"{source}.{imported}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and getattr(node.value, "id", "") in ours:
                found[name].add(f"{node.value.id}.{node.attr}")
    assert not found


@pytest.mark.parametrize("name", FILES)
def test_files_are_of_a_size_to_be_read(name):
    assert len(FILES[name].read_text().splitlines()) <= 400


def test_posteriors_and_states_do_not_ask_whether_a_kernel_is_discrete():
    """Only of which kind a latent is, by the support that NumPyro gives its site."""
    for name, tree in TREES.items():
        if name.startswith(("pp_diffusion.posterior", "pp_diffusion.states")):
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and node.attr == "is_discrete":
                    assert ast.unparse(node.value).split(".")[-1] in ("support", "site"), f"{name}:{node.lineno}"


def test_tests_use_no_private_name():
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(is_private(name) for name in names), where
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                assert getattr(node.value, "id", "") in ("self", "cls"), f"{where} {node.attr}"
