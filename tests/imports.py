"""Who imports whom, read from the source: at module level, in functions, for type checkers, and by string."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CALLS = {"import_module", "__import__", "find_spec"}  # functions that import what a string names


@dataclass(frozen=True)
class Import:
    """`importer` imports `target` in a line. lazy: not when the importer itself is imported."""

    importer: str
    target: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Source:
    """Every module under the given packages, by its dotted name, with its file."""

    files: dict[str, Path]

    @classmethod
    def under(cls, root: Path, *packages: str) -> "Source":
        """Read a tree, of which a package may be absent."""
        paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
        return cls({".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
                    for path in paths})

    def imports(self, module: str) -> list[Import]:
        """All imports of one module. Raises ValueError for one that names its target by an expression."""
        return list(self._walk(module, ast.parse(self.files[module].read_text("utf-8")), lazy=False))

    def reached(self, module: str, lazily: bool) -> dict[str, list[str]]:
        """What comes with a module, the packages around it included, each with the imports that lead there.

        lazily: whatever it may import at any time; otherwise only what its own import brings in.
        """
        chains, waiting = {module: [module]}, [(module, lazily)]
        while waiting:
            name, lazily_too = waiting.pop(0)
            around = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)]
            found = [(package, False) for package in around]  # a package's lazy imports are not its modules'
            if name in self.files:
                found += [(each.target, lazily) for each in self.imports(name)
                          if lazily_too or not each.lazy]
            for target, deeper in found:
                if target not in chains:
                    chains[target] = chains[name] + [target]
                    waiting.append((target, deeper))
        return chains

    def _walk(self, module: str, node: ast.AST, lazy: bool) -> Iterator[Import]:
        for target in self._targets(module, node):
            by_string = not isinstance(node, ast.Import | ast.ImportFrom)
            yield Import(module, target, node.lineno, lazy or by_string)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from self._walk(module, child, inside or _is_for_type_checkers(node) and child in node.body)

    def _targets(self, module: str, node: ast.AST) -> list[str]:
        """What one node of the syntax tree imports by itself."""
        match node:
            case ast.Import(names):
                return [alias.name for alias in names]
            case ast.ImportFrom(base, names, level):
                base = self._absolute(module, level, base or "")
                inner = [f"{base}.{alias.name}" for alias in names]
                return [name if name in self.files else base for name in inner]
            case ast.Call(ast.Attribute(attr=called) | ast.Name(id=called), [name, *_]) if called in _CALLS:
                return self._named_by(module, name)
            case ast.Constant(str(text)) if "." in text and text in self.files:
                return [text]  # for whoever imports it by this name
        return []

    def _named_by(self, module: str, argument: ast.expr) -> list[str]:
        """The modules that a call such as `import_module(argument)` may import."""
        match argument:
            case ast.Constant(str(text)):
                level = len(text) - len(text.lstrip("."))
                return [self._absolute(module, level, text.lstrip("."))]
            case ast.JoinedStr([ast.Constant(str(prefix)), *_]) if re.fullmatch(r"(\w+\.)+", prefix):
                return [name for name in self.files if name.startswith(prefix)]
            case ast.Subscript(ast.Name()):
                return []  # out of a table, whose strings are read where it stands
        raise ValueError(f"{module}, line {argument.lineno}: write the imported module's name as a string")

    def _absolute(self, module: str, level: int, name: str) -> str:
        """A module named with `level` leading dots in `module`."""
        if level == 0:
            return name
        parts = module.split(".")
        is_package = self.files[module].name == "__init__.py"
        parts = parts[:len(parts) - level + is_package]
        return ".".join([*parts, name] if name else parts)


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
