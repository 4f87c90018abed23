"""Tell code that cannot interfere with anything from code that might, by its syntax alone.

A function that returns one expression of operators, slices, comprehensions and well-known value-returning builtins has
no side effects, and text that does not parse never runs: such jobs can share a process. Everything else gets a process
of its own.
"""

from __future__ import annotations

import ast

_MAX_CHARACTERS = 1000
# fmt: off
_BUILTINS = frozenset((
    "abs", "all", "any", "bool", "divmod", "enumerate", "float", "int", "len", "list", "max", "min", "pow", "range",
    "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
))
_METHODS = frozenset((
    "capitalize", "count", "endswith", "find", "index", "isalpha", "isdigit", "islower", "isspace", "isupper", "join",
    "lower", "lstrip", "replace", "rstrip", "split", "startswith", "strip", "swapcase", "title", "upper",
))
# fmt: on
_EXPRESSIONS = (
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.Subscript,
    ast.Slice,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.comprehension,
    ast.Starred,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)  # fmt: skip


def cannot_interfere(code: str) -> bool:
    """Tell whether the code is one harmless expression under a `def` or a named lambda, or does not parse at all."""
    if len(code) > _MAX_CHARACTERS:
        return False
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return True
    except (ValueError, RecursionError, MemoryError):
        return False
    if len(body) != 1:
        return False
    found = _arguments_and_value(body[0])
    return found is not None and _plain_arguments(found[0]) and _is_harmless(found[1], _names(*found))


def _arguments_and_value(statement: ast.stmt) -> tuple[ast.arguments, ast.expr] | None:
    if isinstance(statement, ast.FunctionDef):
        last = statement.body[-1]
        bare = not statement.decorator_list and statement.returns is None and len(statement.body) == 1
        if bare and isinstance(last, ast.Return):
            return statement.args, last.value or ast.Constant(None)
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Lambda):
        named = len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)
        return (statement.value.args, statement.value.body) if named else None
    return None


def _plain_arguments(arguments: ast.arguments) -> bool:
    # Defaults and annotations are expressions that run at definition time.
    return not (
        arguments.defaults
        or arguments.kw_defaults
        or arguments.vararg
        or arguments.kwarg
        or any(argument.annotation for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    )


def _names(arguments: ast.arguments, value: ast.expr) -> frozenset[str]:
    own = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    own |= {node.id for node in ast.walk(value) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return _BUILTINS | own


def _is_harmless(value: ast.expr, names: frozenset[str]) -> bool:
    called_attributes = {id(node.func) for node in ast.walk(value) if isinstance(node, ast.Call)}
    for node in ast.walk(value):
        if isinstance(node, ast.Name):
            harmless = node.id in names
        elif isinstance(node, ast.Attribute):
            harmless = node.attr in _METHODS and id(node) in called_attributes
        elif isinstance(node, ast.Call):
            harmless = not node.keywords and isinstance(node.func, (ast.Name, ast.Attribute))
        elif isinstance(node, ast.comprehension):
            harmless = not node.is_async
        else:
            harmless = isinstance(node, _EXPRESSIONS)
        if not harmless:
            return False
    return True
