"""Whether a chat template copies the contents of messages verbatim, whatever they are.

If it does, one rendering for a sequence of roles serves all conversations with these roles, and the template need not
be rendered for every example. The template's syntax tree tells: a message's `content` may be written, concatenated,
stripped and assigned to a name, and its type may be tested. A template that does anything else with it, such as looking
for a word in it, must be rendered each time.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

_MESSAGES, _CONTENT = "one or more messages", "the content of a message"  # the kinds of an expression's value
_TYPE_TESTS = ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence")


class _InspectsContent(Exception):  # noqa: N818 - not an error: it ends the walk
    """The template inspects a message's content."""


def copies_contents_verbatim(jinja: str) -> bool:
    """Whether the template only writes, concatenates and strips contents. False where that cannot be decided."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(jinja)
    except TemplateSyntaxError:  # such as a tag that only transformers has
        return False
    if next(tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block, nodes.AssignBlock)), None):
        return False
    kinds = {"messages": _MESSAGES}
    try:
        for _ in range(3):  # a name that a loop assigns may be read earlier in its next iteration
            for child in tree.body:
                _check_statement(child, kinds)
    except _InspectsContent:
        return False
    return True


def _check_statement(node: Any, kinds: dict[str, str]) -> None:
    """Notes in `kinds` what the names of a statement hold. Raises _InspectsContent."""
    if isinstance(node, nodes.Output):
        for part in node.nodes:
            if _kind(part, kinds) == _MESSAGES:
                raise _InspectsContent
    elif isinstance(node, nodes.Assign):
        kind = _kind(node.node, kinds)
        if isinstance(node.target, nodes.Name):
            if kind or node.target.name in kinds:
                if kinds.get(node.target.name, kind) != kind:
                    raise _InspectsContent  # one name for values of two kinds
                kinds[node.target.name] = str(kind)
        elif kind:
            raise _InspectsContent
    elif isinstance(node, nodes.For):
        kind = _kind(node.iter, kinds)
        if kind == _CONTENT or not isinstance(node.target, nodes.Name):
            raise _InspectsContent
        if kind:
            kinds[node.target.name] = kind
        if node.test is not None and _kind(node.test, kinds):
            raise _InspectsContent
        for child in (*node.body, *node.else_):
            _check_statement(child, kinds)
    elif isinstance(node, nodes.If):
        if _kind(node.test, kinds):
            raise _InspectsContent
        for child in (*node.body, *node.elif_, *node.else_):
            _check_statement(child, kinds)
    elif isinstance(node, nodes.ExprStmt):
        if _kind(node.node, kinds):
            raise _InspectsContent
    elif not isinstance(node, nodes.Continue | nodes.Break):
        raise _InspectsContent


def _kind(node: Any, kinds: dict[str, str]) -> str | None:
    """The kind of an expression's value: messages, a content, or neither. Raises _InspectsContent."""
    if isinstance(node, nodes.Name):
        return kinds.get(node.name)
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        return _member(node, kinds)
    operands = [_kind(child, kinds) for child in node.iter_child_nodes()]
    operand_kinds = {kind for kind in operands if kind}
    if not operand_kinds:
        return None
    if isinstance(node, nodes.Test) and node.name in _TYPE_TESTS and len(operands) == 1:
        return None
    if isinstance(node, nodes.Filter):
        if operand_kinds == {_CONTENT} and node.name == "trim" and not node.args and not node.kwargs:
            return _CONTENT
        if operand_kinds == {_MESSAGES} and node.name in ("length", "count"):
            return None
    elif isinstance(node, nodes.Add | nodes.Concat) and operand_kinds == {_CONTENT}:
        return _CONTENT
    elif isinstance(node, nodes.CondExpr) and not _kind(node.test, kinds) and len(operand_kinds) == 1:
        return operand_kinds.pop()
    raise _InspectsContent


def _member(node: Any, kinds: dict[str, str]) -> str | None:
    """The kind of `message.content`, `message['role']`, `messages[1:]` and the like."""
    kind = _kind(node.node, kinds)
    if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Const):
        if kind == _CONTENT or _index_has_kind(node.arg, kinds):
            raise _InspectsContent
        return kind
    if kind is None:
        return None
    if kind == _CONTENT:
        raise _InspectsContent
    name = node.attr if isinstance(node, nodes.Getattr) else node.arg.value
    if isinstance(name, int):
        return kind
    if name == "content":
        return _CONTENT
    if name in ("role", "tool_calls", "reasoning_content", "name", "prefix", "thinking"):
        return None
    raise _InspectsContent  # get, items, keys ...


def _index_has_kind(node: Any, kinds: dict[str, str]) -> bool:
    return any(_kind(child, kinds) for child in node.iter_child_nodes())
