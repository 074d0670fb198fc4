"""Whether a chat template writes the words of people as they are, whatever they are.

Then a conversation's text is known from its roles alone, and the template need not be rendered for every example. Read
off the template's syntax tree: a message's `content` may be written, joined, stripped and given a name, and its type
may be asked for. Anything else, such as looking into it, makes a template one that is rendered each time.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

_MESSAGES, _CONTENT = "a message or several", "the words of a message"
_OF_TYPE = ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence")


class _InspectsContent(Exception):  # noqa: N818 - no error: it ends the walk
    """The template looks into a message's words."""


def copies_contents_verbatim(jinja: str) -> bool:
    """Whether the template only writes, joins and strips what messages say. False where that cannot be told."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(jinja)
    except TemplateSyntaxError:  # a tag of transformers
        return False
    if next(tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block, nodes.AssignBlock)), None):
        return False
    kinds = {"messages": _MESSAGES}
    try:
        for _ in range(3):  # names that are given in a loop are known in its next turn
            for child in tree.body:
                _statement(child, kinds)
    except _InspectsContent:
        return False
    return True


def _statement(node: Any, kinds: dict[str, str]) -> None:
    if isinstance(node, nodes.Output):
        for part in node.nodes:
            if _kind(part, kinds) == _MESSAGES:
                raise _InspectsContent
    elif isinstance(node, nodes.Assign):
        kind = _kind(node.node, kinds)
        if isinstance(node.target, nodes.Name):
            if kind or node.target.name in kinds:
                if kinds.get(node.target.name, kind) != kind:
                    raise _InspectsContent  # one name for two things
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
            _statement(child, kinds)
    elif isinstance(node, nodes.If):
        if _kind(node.test, kinds):
            raise _InspectsContent
        for child in (*node.body, *node.elif_, *node.else_):
            _statement(child, kinds)
    elif isinstance(node, nodes.ExprStmt):
        if _kind(node.node, kinds):
            raise _InspectsContent
    elif not isinstance(node, nodes.Continue | nodes.Break):
        raise _InspectsContent


def _kind(node: Any, kinds: dict[str, str]) -> str | None:
    """What an expression holds: messages, their words, or neither. Raises _Looks where it looks into words."""
    if isinstance(node, nodes.Name):
        return kinds.get(node.name)
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        return _member(node, kinds)
    parts = [_kind(child, kinds) for child in node.iter_child_nodes()]
    found = {part for part in parts if part}
    if not found:
        return None
    if isinstance(node, nodes.Test) and node.name in _OF_TYPE and len(parts) == 1:
        return None
    if isinstance(node, nodes.Filter):
        if found == {_CONTENT} and node.name == "trim" and not node.args and not node.kwargs:
            return _CONTENT
        if found == {_MESSAGES} and node.name in ("length", "count"):
            return None
    elif isinstance(node, nodes.Add | nodes.Concat) and found == {_CONTENT}:
        return _CONTENT
    elif isinstance(node, nodes.CondExpr) and not _kind(node.test, kinds) and len(found) == 1:
        return found.pop()
    raise _InspectsContent


def _member(node: Any, kinds: dict[str, str]) -> str | None:
    """`message.content`, `message['role']`, `messages[1:]` and the like."""
    kind = _kind(node.node, kinds)
    if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Const):
        if kind == _CONTENT or _kind_of_index(node.arg, kinds):
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


def _kind_of_index(node: Any, kinds: dict[str, str]) -> bool:
    return any(_kind(child, kinds) for child in node.iter_child_nodes())
