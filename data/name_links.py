"""Which definition each name of a Python file refers to, for data/make_page.py.

A definition's id is its qualified name, such as "KVCache.add_tokens". A name refers to what the
innermost scope that binds it says. An attribute refers to a definition only if the class of the
object is known: from `self`, an annotation, or the one kind of value that is assigned to a
variable. Whatever is unsure refers to nothing.
"""

import ast
import re
from collections.abc import Iterator

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Scope = dict[str, tuple[str, str]]  # by name: the id it refers to, and the class of its value


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes in the scope of `node`: not those inside of its functions, lambdas, etc."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*DEFINITIONS, *OTHER_SCOPES)):
            yield from own_nodes(child)


def assigned_to(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """The targets of an assignment and their values; those of a, b = f() are None."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, (ast.Tuple, ast.List)):
                values = getattr(node.value, "elts", [])
                known = len(values) == len(target.elts)
                yield from zip(target.elts, values if known else [None] * len(target.elts))
            else:
                yield target, node.value


def annotated(node: ast.expr | None) -> str:
    """The name of the class in an annotation: X, "X" or X | None; else ""."""
    if isinstance(node, ast.BinOp) and getattr(node.right, "value", "") is None:
        node = node.left
    return str(getattr(node, "id", "") or getattr(node, "value", ""))


class Names:
    """The definitions of a file, and the places of names that refer to them."""

    def __init__(self, source: str):
        self.lines = source.splitlines()
        self.tooltips: dict[str, str] = {}  # of each id
        self.places: dict[tuple[int, int], str] = {}  # by line and column: the id defined there
        self.links: dict[tuple[int, int], str] = {}  # the id that the name there refers to
        self.starts: dict[int, str] = {}  # by first line: top-level or documented definitions
        self.docs: dict[int, int] = {}  # first and last line of each docstring
        self.owner: dict[int, str] = {}  # the innermost definition that a line is in
        self.functions: set[str] = set()
        self.locals: dict[str, Scope] = {}  # of each function
        self.bases: dict[str, list[str]] = {}  # of each class
        self.types: dict[str, str] = {}  # the class of an attribute, or of what is returned
        self.shift = 0, 0  # lines and columns to add, for examples in docstrings
        tree = ast.parse(source)
        self.docstring(tree)
        self.collect(tree, "")
        self.module: Scope = {name: (name, "") for name in self.tooltips if "." not in name}
        self.visit(tree, [self.module])
        for first, last in self.docs.items():
            self.visit_examples(first, last)

    def docstring(self, node: ast.Module | Definition) -> str:
        """The first line of the docstring of `node`. Records where it is."""
        doc = ast.get_docstring(node) or ""
        if doc:
            self.docs[node.body[0].lineno] = node.body[0].end_lineno or 0
        return doc.partition("\n")[0]

    def define(self, name: str, line: int, column: int, tooltip: str = "") -> None:
        """Record a definition, with the comment beside it if there is no better tooltip."""
        if name not in self.tooltips:
            code, _, comment = self.lines[line - 1].partition("  # ")
            self.tooltips[name] = tooltip or comment or code.strip()
            self.places[line, column] = name

    def collect(self, parent: ast.Module | Definition, prefix: str) -> None:
        """Record the definitions in the body of `parent`; of a function, only functions."""
        for node in parent.body:
            if isinstance(node, DEFINITIONS):
                name, doc = prefix + node.name, self.docstring(node)
                is_class = isinstance(node, ast.ClassDef)
                self.define(name, node.lineno, node.col_offset + (6 if is_class else 4), doc)
                first = min(n.lineno for n in [node, *node.decorator_list])
                self.owner.update(dict.fromkeys(range(first, (node.end_lineno or 0) + 1), name))
                if not prefix or doc and isinstance(parent, ast.ClassDef):
                    self.starts[first] = name
                if isinstance(node, ast.ClassDef):
                    self.bases[name] = [b.id for b in node.bases if isinstance(b, ast.Name)]
                else:
                    self.functions.add(name)
                    self.types[name] = annotated(node.returns)
                self.collect(node, name + ".")
            elif not isinstance(parent, FUNCTIONS):
                for target, _ in assigned_to(node):
                    if isinstance(target, ast.Name):
                        self.define(prefix + target.id, target.lineno, target.col_offset)
                        annotation = getattr(node, "annotation", None)
                        self.types[prefix + target.id] = annotated(annotation)

    def member(self, kind: str, name: str) -> str:
        """The id of an attribute of the class `kind`, which may inherit it."""
        if f"{kind}.{name}" in self.tooltips:
            return f"{kind}.{name}"
        return next(filter(None, (self.member(b, name) for b in self.bases.get(kind, []))), "")

    def target(self, node: ast.AST, scopes: list[Scope]) -> str:
        """The id that a name or an attribute refers to, or ""."""
        if isinstance(node, ast.Name):
            return next((s[node.id][0] for s in scopes if node.id in s), "")
        if isinstance(node, ast.Attribute):
            owner = self.target(node.value, scopes)
            kind = owner if owner in self.bases else self.kind(node.value, scopes)
            return self.member(kind, node.attr)
        return ""

    def kind(self, node: ast.AST | None, scopes: list[Scope]) -> str:
        """The class of an expression's value, or ""."""
        if isinstance(node, ast.Name):
            return next((s[node.id][1] for s in scopes if node.id in s), "")
        if isinstance(node, ast.BoolOp):  # cache or KVCache()
            return self.kind(node.values[-1], scopes)
        if isinstance(node, ast.Call):
            target = self.target(node.func, scopes)
            return target if target in self.bases else self.types.get(target, "")
        return self.types.get(self.target(node, scopes), "") if node else ""

    def scope(
        self, node: ast.AST, scopes: list[Scope], prefix: str = "", me: str = ""
    ) -> Scope:
        """The names that `node` binds. If it's a method of the class `me`, its self.x, too."""
        kinds: dict[str, set[str]] = {}  # of the values of each name
        for child in ast.iter_child_nodes(getattr(node, "args", ast.Pass())):
            if isinstance(child, ast.arg):
                kinds[child.arg] = {annotated(child.annotation) if kinds or not me else me}
        scope = {name: ("", min(kind)) for name, kind in kinds.items()}
        given: dict[ast.AST, str] = {}  # the class of what is assigned to a target
        for inner in own_nodes(node):
            for it, value in assigned_to(inner):
                given[it] = self.kind(value, [scope, *scopes])
                if me and isinstance(it, ast.Attribute) and self.kind(it.value, [scope]) == me:
                    if not self.member(me, it.attr):
                        column = (it.end_col_offset or 0) - len(it.attr)
                        self.define(f"{me}.{it.attr}", it.lineno, column)
                    self.types.setdefault(f"{me}.{it.attr}", given[it])
            if isinstance(inner, DEFINITIONS):
                scope[inner.name] = prefix + inner.name if prefix else "", ""
            elif isinstance(inner, ast.alias):
                scope[(inner.asname or inner.name).split(".")[0]] = "", ""
            elif isinstance(inner, ast.ExceptHandler) and inner.name:
                scope[inner.name] = "", ""
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                known = kinds.setdefault(inner.id, set())
                known.add(given.get(inner, ""))
                scope[inner.id] = "", min(known) if len(known) == 1 else ""
        for inner in own_nodes(node):
            for name in inner.names if isinstance(inner, ast.Global) else []:
                scope.pop(name, None)
        return scope

    def visit(self, node: ast.AST, scopes: list[Scope], prefix: str = "", me: str = "") -> None:
        """Fill `links`. `me` is the class whose body `node` is in, if it's in one."""
        inner_scopes = scopes
        if isinstance(node, FUNCTIONS):
            prefix += node.name + "."
            self.locals[prefix[:-1]] = self.scope(node, scopes, prefix, me)
            inner_scopes, me = [self.locals[prefix[:-1]], *scopes], ""
        elif isinstance(node, OTHER_SCOPES):
            scopes = inner_scopes = [self.scope(node, scopes), *scopes]
        elif isinstance(node, ast.ClassDef):
            prefix, me = f"{prefix}{node.name}.", prefix + node.name
            for method in node.body:  # a first pass, for what they assign to self
                if isinstance(method, FUNCTIONS):
                    self.scope(method, scopes, "", me)
        elif target := self.target(node, scopes):
            name, line = target.rpartition(".")[2], node.end_lineno + self.shift[0]
            before = self.lines[line - 1].encode()[: node.end_col_offset]  # bytes
            column = len(before.decode()) - len(name) + self.shift[1]
            if self.lines[line - 1].startswith(name, column):
                self.links[line, column] = target
        for child in ast.iter_child_nodes(node):
            # Decorators, annotations and defaults of a function don't see its names.
            inside = child in getattr(node, "body", []) if isinstance(node, FUNCTIONS) else True
            self.visit(child, inner_scopes if inside else scopes, prefix, me)

    def visit_examples(self, first: int, last: int) -> None:
        """Fill `links` for the examples (>>>) of the docstring in these lines."""
        lines = self.lines[first - 1 : last]
        prompts = [re.match(r" *(>>>|\.\.\.) ", line) for line in lines]
        if any(prompts):
            code = [line[m.end() :] if m else "" for m, line in zip(prompts, lines)]
            tree = ast.parse("\n".join(code))
            self.shift = first - 1, next(m.end() for m in prompts if m)
            self.visit(tree, [self.scope(tree, [self.module]), self.module])
            self.shift = 0, 0

    def mentioned(self, text: str, context: str) -> str:
        """The id that prose of the definition `context` means by `text`; "" when unsure."""
        name, parts = text.removesuffix("()"), context.split(".")
        around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if any(name in self.locals.get(outer, ()) for outer in around):
            return ""
        if name in self.tooltips:
            return name
        methods = {f"{c}.{name}" for c in self.bases} & (
            self.tooltips.keys() if name.isupper() else self.functions)
        near = [d for d in (self.member(outer, name) for outer in around) if d in methods]
        return near[0] if near else methods.pop() if len(methods) == 1 else ""
