"""Writes to what vLLM's routers return, found in vLLM's sources.

A name is followed from function to function: it starts where the names that vLLM gives a router's outputs stand, goes
through assignments that may keep the same memory, and, by the name of what is called, into the parameters of functions
and Triton kernels of the same files. Compiled kernels cannot be read; their call is what Python shows of them.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

#: Names of what routers return, as vLLM writes them.
OUTPUTS = frozenset({"topk_ids", "topk_weights"})
#: Calls whose result is new memory, whatever they are called on.
_FRESH = frozenset((
    "clone", "new_zeros", "new_empty", "new_full", "new_ones", "new_tensor", "size", "numel", "dim", "stride",
    "element_size", "tolist", "item", "cpu", "max", "min", "sum", "mean", "any", "all", "argsort", "sort", "nonzero",
    "unique", "bincount", "repeat", "repeat_interleave", "amax", "amin", "cumsum", "topk", "gather",
))  # fmt: skip
#: Functions whose result may be the memory of their arguments.
_VIEWS = frozenset((
    "cast", "flatten", "reshape", "ravel", "narrow", "select", "squeeze", "unsqueeze", "transpose", "permute", "t",
    "as_strided", "split", "chunk", "unbind", "expand_as", "view_as", "atleast_1d", "atleast_2d", "from_dlpack",
    "to_dlpack", "asarray", "as_tensor", "tuple", "list",
))  # fmt: skip
#: Functions of `torch.distributed` that write where they read.
_COLLECTIVES = frozenset(("all_reduce", "broadcast", "reduce", "recv", "irecv"))
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)
#: Attributes that are not memory.
_FACTS = frozenset(("shape", "dtype", "device", "ndim", "is_cuda"))


@dataclass(frozen=True, order=True, slots=True)
class Write:
    """An operation that changes, or may change, what a router returned.

    Attributes:
        path: File.
        function: Function or method, after its class.
        text: The operation as it is written.
    """

    path: str
    function: str
    text: str


@dataclass(slots=True)
class _Scope:
    """A function: its parameters, its assignments and calls, and the names that may hold what a router returned."""

    path: str
    name: str
    parameters: list[str]
    assignments: list[ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr]
    calls: list[ast.Call]
    held: set[str]


def find_writes(trees: Mapping[str, ast.Module]) -> list[Write]:
    """Every write to what routers return in parsed files, by path."""
    scopes = [scope for path, tree in trees.items() for scope in _scopes(path, tree)]
    by_name: dict[str, list[_Scope]] = defaultdict(list)
    for scope in scopes:
        by_name[scope.name.rpartition(".")[2]].append(scope)
    waiting = list(scopes)
    while waiting:
        scope = waiting.pop()
        _spread(scope)
        for target, name in _handed_on(scope, by_name):
            if name not in target.held:
                target.held.add(name)
                waiting.append(target)
    return sorted({write for scope in scopes for write in _writes(scope)})


def _scopes(path: str, tree: ast.AST, owner: str = "") -> Iterator[_Scope]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if names[:1] in (["self"], ["cls"]):
                del names[0]
            body = list(_body(node))
            assignments = [one for one in body if isinstance(one, _ASSIGNMENTS)]
            calls = [one for one in body if isinstance(one, ast.Call)]
            yield _Scope(path, f"{owner}{node.name}", names, assignments, calls, set(OUTPUTS))
            yield from _scopes(path, node, f"{owner}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _scopes(path, node, f"{owner}{node.name}.")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _scopes(path, node, owner)


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            stack.extend(ast.iter_child_nodes(node))


def _holds(node: ast.expr, held: set[str]) -> bool:
    """Whether an expression may be the memory of a held name: itself, a view, a slice, a pointer into it."""
    if isinstance(node, ast.Name):
        return node.id in held
    if isinstance(node, ast.Attribute):
        return node.attr in OUTPUTS or (node.attr not in _FACTS and _holds(node.value, held))
    if isinstance(node, ast.Subscript | ast.Starred):
        return _holds(node.value, held)
    if isinstance(node, ast.Call):
        if _called(node) in _VIEWS and any(_holds(one, held) for one in node.args):
            return True
        return isinstance(node.func, ast.Attribute) and node.func.attr not in _FRESH and _holds(node.func.value, held)
    if isinstance(node, ast.Tuple | ast.List):
        return any(_holds(one, held) for one in node.elts)
    if isinstance(node, ast.IfExp):
        return _holds(node.body, held) or _holds(node.orelse, held)
    return False


def _called(node: ast.Call) -> str:
    """Name of what is called, without its module, its object or a Triton kernel's grid."""
    called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _spread(scope: _Scope) -> None:
    """Add the names that are bound to what held names hold."""
    before = 0
    while len(scope.held) > before:
        before = len(scope.held)
        for node in scope.assignments:
            if not isinstance(node, ast.AugAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    scope.held |= set(_bound(target, node.value, scope.held))


def _bound(target: ast.expr, value: ast.expr, held: set[str]) -> Iterator[str]:
    if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
        if len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                yield from _bound(one, other, held)
    elif isinstance(target, ast.Name) and _holds(value, held):
        yield target.id


def _handed_on(scope: _Scope, by_name: Mapping[str, list[_Scope]]) -> Iterator[tuple[_Scope, str]]:
    """Parameters of known functions that are given a held name."""
    for node in scope.calls:
        for target in by_name.get(_called(node), ()):
            for place, argument in enumerate(node.args):
                if place < len(target.parameters) and _holds(argument, scope.held):
                    yield target, target.parameters[place]
            for keyword in node.keywords:
                if keyword.arg in target.parameters and _holds(keyword.value, scope.held):
                    yield target, keyword.arg


def _writes(scope: _Scope) -> Iterator[Write]:
    for node in (*scope.assignments, *scope.calls):
        changes = _call_changes(node, scope.held) if isinstance(node, ast.Call) else _sets(node, scope.held)
        if changes:
            yield Write(scope.path, scope.name, ast.unparse(node))


def _sets(node: ast.stmt | ast.expr, held: set[str]) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Subscript) and _holds(target, held) for target in _flat(node.targets))
    return isinstance(node, ast.AugAssign) and _holds(node.target, held)


def _call_changes(node: ast.Call, held: set[str]) -> bool:
    name = _called(node)
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    if any(keyword.arg == "out" and _holds(keyword.value, held) for keyword in node.keywords):
        return True
    if name.endswith("_") and not name.endswith("__"):
        receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return any(_holds(one, held) for one in (*receiver, *node.args[: not _is_method(node)]))
    if name in _COLLECTIVES:
        return any(_holds(one, held) for one in given)
    if name == "store" or name.startswith("atomic_"):  # Triton: a pointer, or a sum with one
        return any(isinstance(one, ast.Name) and one.id in held for arg in node.args[:1] for one in ast.walk(arg))
    return False


def _is_method(node: ast.Call) -> bool:
    """Whether a call is of a tensor's method rather than of a module's function, as far as can be seen."""
    return isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).split(".")[0] not in ("torch", "F")


def _flat(targets: Iterable[ast.expr]) -> Iterator[ast.expr]:
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            yield from _flat(target.elts)
        else:
            yield target
