"""A model whose forward pass has no hook points: what they cost is measured against it."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
import types

from jambascope.model import HookedJamba


def without_hook_points(model: HookedJamba) -> HookedJamba:
    """A copy with the same weights, in whose methods ``self.hook_x(value)`` is ``value`` and ``.heard`` is False.

    The methods are compiled anew from their source with the hook points taken out, so that not even a call is left.
    """
    weights = {id(p): p for p in model.parameters()}  # shared, not copied
    bare = copy.deepcopy(model, memo=weights)
    for module in bare.modules():
        if not type(module).__module__.startswith("jambascope."):
            continue
        for name, method in inspect.getmembers(type(module), inspect.isfunction):
            if method.__module__.startswith("jambascope.") and "self.hook_" in inspect.getsource(method):
                owner = next(kind for kind in type(module).__mro__ if vars(kind).get(name) is method)
                setattr(module, name, types.MethodType(_stripped(owner, method), module))
    return bare


def _stripped(owner: type, method: types.FunctionType) -> types.FunctionType:
    source = textwrap.indent(textwrap.dedent(inspect.getsource(method)), "    ")
    # An enclosing variable of this name is what super() without arguments looks for.
    tree = ast.parse(f"def outer(__class__):\n{source}\n    return {method.__name__}")
    tree.body[0].body[0].decorator_list = []
    tree = ast.fix_missing_locations(_Strip().visit(tree))
    made: dict[str, types.FunctionType] = {}
    code = compile(tree, f"<{method.__qualname__} without hook points>", "exec")
    exec(code, vars(sys.modules[method.__module__]), made)
    return made["outer"](owner)


class _Strip(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return node.args[0] if _is_hook_point(node.func) and node.args else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        asks = node.attr in ("heard", "wants_gradient") and _is_hook_point(node.value)
        return ast.copy_location(ast.Constant(False), node) if asks else node


def _is_hook_point(node: ast.AST) -> bool:
    """Whether an expression is ``self.hook_x``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr.startswith("hook_")
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
