"""The shape of the package: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import auditlog

PACKAGE = Path(auditlog.__file__).parent

# A module may import from its own layer and from those before it.
LAYERS = [
    "errors",
    "events",
    "capture.session",
    "storage",
    "query",
    "background",
    "coalescing",
    "committing",
    "failures",
    "health",
    "forward.destination",
    "settings",
    "forward",
    "engine",
    "logger",
    "capture",
    "testing",
    "cli",
    "__main__",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
MODULES.pop("__init__")  # hands names on, when they are asked for


def layer_of(module: str) -> int:
    fitting = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    assert fitting, f"{module} is in no layer: say in LAYERS where it belongs"
    return LAYERS.index(max(fitting, key=len))


def imports_of(module: str) -> set[str]:
    """The package's own modules that a module imports, wherever in it."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {target} if target in MODULES else {f"{target}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            assert not any(name.split(".")[0] == "auditlog" for name in names), f"{module}: import relatively"
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_in_one_direction(module: str) -> None:
    wrong = {target for target in imports_of(module) if layer_of(target) > layer_of(module)}
    assert not wrong, f"{module} must not import {wrong}"


def test_only_files_touches_files() -> None:
    calls = {"write", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir", "makedirs"}
    for module, path in MODULES.items():
        if module in {"storage.files", "testing"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in calls, f"{module} calls os.{node.attr}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_longer_than_a_sitting(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 400


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_the_package_loads_nothing_else() -> None:
    assert not {"pydantic", "orjson", "filelock", "dateutil", "asyncio", "zoneinfo"} & loaded_after(
        "import auditlog"
    )


def test_importing_the_logger_loads_no_optional_package() -> None:
    optional = {"filelock", "dateutil", "asyncio", "click", "fastapi", "starlette", "httpx", "ssl", "yaml"}
    assert not optional & loaded_after("from auditlog import AuditLogger, AuditReader")


# What a module may import that the package does not bring.
OPTIONAL = {
    "capture.aiohttp": {"aiohttp"},
    "capture.celery": {"celery", "itsdangerous"},
    "capture.django": {"asgiref", "django"},
    "capture.grpc": {"grpc"},
    "capture.sqlalchemy": {"sqlalchemy"},
    "capture.sqlalchemy_rows": {"sqlalchemy"},
    "capture.talos": {"grpc"},
    "cli": {"click"},
    "forward.documents": {"yaml"},
    "forward.http": {"h11", "httpx"},
    "storage.blocks": {"stringzilla"},
}
BASE = {"dateutil", "filelock", "orjson", "pydantic"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_its_own_framework_and_no_other(module: str) -> None:
    allowed = BASE | OPTIONAL.get(module, set()) | OPTIONAL.get(module.partition(".")[0], set())
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        roots = {name.split(".")[0] for name in names}
        assert roots <= sys.stdlib_module_names | allowed, f"{module} imports {roots}"


def test_a_disabled_log_loads_no_pydantic() -> None:
    assert "pydantic" not in loaded_after("from auditlog import AuditLogger; AuditLogger('').create('T')")


def test_public_names_are_sorted_and_lead_where_type_checkers_look() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == auditlog._home_of
    assert auditlog.__all__ == sorted(auditlog.__all__)
    for name in auditlog.__all__:
        assert getattr(auditlog, name).__name__ == name
    assert set(auditlog.__all__) <= set(dir(auditlog))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        auditlog.Nothing  # noqa: B018


def test_every_public_name_has_a_docstring() -> None:
    for name in auditlog.__all__:
        value = getattr(auditlog, name)
        assert (value.__doc__ or "").strip(), name
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and getattr(member, "__module__", "") == value.__module__:
                assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


def test_reading_loads_no_pydantic_before_an_entry_is_asked_for_its_event() -> None:
    assert "pydantic" not in loaded_after(
        "from auditlog import AuditReader, Filter, Follower, RetentionSweeper"
    )
