"""From YAML text or plain data to a validated object, with every mistake found in one go and said in one line each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import RecipeError, SurgeryError

Model = TypeVar("Model", bound=BaseModel)
Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Plain data only, and 1e-3 is a number: YAML 1.1, as PyYAML reads it, wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass
class Document:
    """Plain data, where it came from, and on which line each key path stands."""

    data: Any
    source: str
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def rename(self, old: Path, new: Path) -> None:
        """Let what stood at `old` be found at `new` too."""
        for path, line in list(self.lines.items()):
            if path[: len(old)] == old:
                self.lines[new + path[len(old) :]] = line

    def report(self, path: Path, text: str, line: int | None = None) -> None:
        """Note a problem: where it is (source, line, key path) and what is wrong."""
        if line is None:
            line = next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0)
        place = f"{self.source}:{line}" if line else self.source
        self.problems.append((line, f"{place}: {dotted(path)}: {text}" if path else f"{place}: {text}"))

    def raise_problems(self) -> None:
        if self.problems:
            raise RecipeError(*(text for _, text in sorted(self.problems, key=lambda problem: problem[0])))


@dataclass(frozen=True)
class _Problem:
    """A mistake at `path`.

    repair: the data as it was most likely meant, to look for mistakes behind this one. meant: the likely path.
    """

    path: Path
    text: str
    repair: Any = None
    meant: Path | None = None
    missing: bool = False


def parse_yaml(text: str, source: str) -> Document:
    """Read one YAML document; duplicate keys are noted as problems.

    Raises:
        RecipeError: `text` is not YAML, or asks for anything but plain data.
    """
    loader = _Loader(text)
    document = Document(None, source)
    try:
        node = loader.get_single_node()
        if node is not None:
            _note(document, node, (), set())
            document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        raise RecipeError(f"{place}: not plain YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{source}: not plain YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return document


def _note(document: Document, node: yaml.Node, path: Path, seen: set[int]) -> None:
    # an alias brings the same node again, possibly inside itself
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*path, index)
            document.lines[here] = item.start_mark.line + 1
            _note(document, item, here, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            here, line = (*path, key.value), key.start_mark.line + 1
            if here in document.lines and key.value != "<<":
                document.report(here, f"given twice, first on line {document.lines[here]}; keep one", line)
            document.lines[here] = line
            _note(document, value, here, seen)


def parse_changes(changes: Iterable[str], example: str) -> dict[str, Any]:
    """The values of KEY=VALUE texts, which are YAML.

    Raises:
        SurgeryError: a text has no key; the message shows the example.
    """
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise SurgeryError(f"--set {change}: expected KEY=VALUE, as in --set {example}")
        values[key.strip()] = parse_yaml(text, f"--set {key}").data
    return values


def validate(model: type[Model], document: Document) -> Model:
    """Make a `model` of a document.

    Raises:
        RecipeError: with one line for each mistake. A misspelt key or choice does not hide mistakes behind it: the
            search goes on as if it had been spelt right.
    """
    data: Any = document.data
    problems: dict[Path, str] = {}
    for _ in range(20):
        try:
            result = model.model_validate(data)
            break
        except ValidationError as error:
            found = [_explain(model, data, details) for details in error.errors(include_url=False)]
        problems.update({p.path: p.text for p in found if not p.missing and p.path not in problems})
        missing = [p for p in found if p.missing]
        # one repair at a time: the next round sees the others again
        repaired = next((p for p in found if p.repair is not None), None)
        if repaired is None:
            # only now is it sure that a key is not there under a misspelt name
            problems.update({p.path: p.text for p in missing if p.path not in problems})
            break
        data = repaired.repair
        if repaired.meant is not None:
            document.rename(repaired.path, repaired.meant)
    for path, text in problems.items():
        document.report(path, text)
    document.raise_problems()
    return result


def _explain(model: type[BaseModel], data: Any, details: Any) -> _Problem:
    path, owners, targets = _locate(model, data, details["loc"])
    kind, found, context = details["type"], short(details["input"]), details.get("ctx", {})
    last = path[-1] if path else None
    if kind == "extra_forbidden":
        known = sorted({name for owner in owners for name in owner.model_fields})
        guess = closest(last, known)
        if guess is None:
            return _Problem(path, f"unknown key; expected {one_of(known)}")
        return _misspelt(data, path, guess)
    if kind == "missing":
        return _Problem(path, "missing; it is required", missing=True)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_tag(data, path, details["input"], _kinds(targets))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        kinds = _kinds(targets)
        hint = f" with `kind`: {one_of(kinds)}" if len(kinds) > 1 else ""
        return _Problem(path, f"expected a mapping{hint}, found {found}")
    if kind == "literal_error":
        return _choice(data, path, details["input"], re.findall(r"'([^']*)'", context["expected"]))
    if kind == "value_error":
        return _Problem(path, str(context["error"]))
    expected = re.sub(r", unable to parse .*", "", details["msg"])
    expected = re.sub(r"^Input should be (?=greater|less)", "expected a value ", expected)
    return _Problem(path, f"{re.sub('^Input should (be|have)', 'expected', expected)}, found {found}")


def _explain_tag(data: Any, path: Path, found: Any, kinds: list[str]) -> _Problem:
    given = found if isinstance(found, dict) else {}
    if "kind" in given:
        return _choice(data, (*path, "kind"), given["kind"], kinds)
    misspelt = closest("kind", [key for key in given if isinstance(key, str)])
    if misspelt is not None:
        return _misspelt(data, (*path, misspelt), "kind")
    return _Problem((*path, "kind"), f"missing; expected {one_of(kinds)}")


def _misspelt(data: Any, path: Path, name: str) -> _Problem:
    return _Problem(path, f"unknown key; did you mean {name!r}?", _renamed(data, path, name), (*path[:-1], name))


def _choice(data: Any, path: Path, found: Any, options: list[str]) -> _Problem:
    guess = closest(found, options)
    hint = "" if guess is None else f"; did you mean {guess!r}?"
    text = f"expected {one_of(options)}, found {short(found)}{hint}"
    return _Problem(path, text, None if guess is None else _replaced(data, path, guess))


def _locate(model: type[BaseModel], data: Any, location: tuple) -> tuple[Path, list, list]:
    """The key path without pydantic's union tags, the classes that own its last key, and the classes it may hold."""
    path: Path = ()
    owners: list[type[BaseModel]] = []
    targets: list[type[BaseModel]] = [model]
    value, tagged = data, False
    for step in location:
        if isinstance(step, str) and step.startswith("<"):
            continue  # a tag without a `kind`
        if isinstance(value, dict) and not tagged and value.get("kind") == step:
            targets, tagged = [t for t in targets if step in _kinds([t])], True
            continue
        if not isinstance(value, dict | list):
            break
        path, tagged = (*path, step), False
        value = value.get(step) if isinstance(value, dict) else value[step]
        if isinstance(step, str):
            owners, fields = targets, [t.model_fields[step].annotation for t in targets if step in t.model_fields]
            targets = [found for annotation in fields for found in _models(annotation)]
    return path, owners, targets


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]


def _kinds(models: Iterable[type[BaseModel]]) -> list[str]:
    return [kind for m in models if "kind" in m.model_fields for kind in get_args(m.model_fields["kind"].annotation)]


def _renamed(data: Any, path: Path, name: str) -> Any:
    data, parent = _copy_to_parent(data, path)
    if name in parent:
        return None
    parent[name] = parent.pop(path[-1])
    return data


def _replaced(data: Any, path: Path, value: Any) -> Any:
    data, parent = _copy_to_parent(data, path)
    parent[path[-1]] = value
    return data


def _copy_to_parent(data: Any, path: Path) -> tuple[Any, Any]:
    parent = data = deepcopy(data)
    for step in path[:-1]:
        parent = parent[step]
    return data, parent


def closest(word: Any, options: Iterable[str]) -> str | None:
    """The option that `word` most likely meant, if any is near."""
    return next(iter(get_close_matches(word, list(options), 1)), None) if isinstance(word, str) else None


def one_of(options: Iterable[str]) -> str:
    """'a', 'b' or 'c'."""
    names = [repr(option) for option in options]
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def dotted(path: Path) -> str:
    """stages[0].lr"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def short(value: Any) -> str:
    """A value as a recipe spells it, kept short."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
