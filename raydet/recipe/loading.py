"""Recipes are read here: shipped ones and files, with overrides on top; what is wrong in one is said in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from raydet.errors import RaydetError, did_you_mean
from raydet.plugins import accepts, is_own, locate
from raydet.recipe.section import Section
from raydet.recipe.training import LOSSES, OwnLoss, loss_kind
from raydet.recipe.tree import Recipe, flat
from raydet.store import Store, above, is_uri, join
from raydet.yaml_text import read as read_yaml
from raydet.yaml_text import write as write_yaml


def shipped() -> dict[str, Path]:
    """Return the recipes that come with raydet: name → file."""
    folder = Path(str(files("raydet") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(recipe: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a shipped name, the path or address of a YAML file, or a recipe. A file may name a `base`, another
            recipe, which has the settings that the file does not state.
        overrides: `section.key=value`. A value is YAML; that of a setting that is text is taken as it is typed.

    Raises:
        RaydetError: there is no such recipe, or a key or value in it is wrong; the message names it.
    """
    if isinstance(overrides, str):
        raise RaydetError(f"overrides: {overrides!r} is one text, not a list: [{overrides!r}]")
    if isinstance(recipe, Recipe):
        tree, source = recipe.model_dump(mode="json"), "recipe"
    else:
        path = _file(str(recipe))
        tree, source = _tree(path), f"recipe {recipe}"
        tree["name"] = tree.get("name") or PurePosixPath(above(path)[1]).stem
    # Another loss first: it decides which arguments there are.
    for text in sorted(overrides, key=lambda text: not text.startswith("loss.name=")):
        if text.startswith("loss.name="):
            tree["loss"] = _whole_loss(tree.get("loss", {}))
        _override(tree, text)
    return _validate(tree, source)


def keys_given(overrides: Iterable[str]) -> frozenset[str]:
    """Return the keys that overrides set.

    Raises:
        RaydetError: one is no override.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        _override(tree, text)
    return frozenset(flat(tree))


def override(key: str, value: Any) -> str:
    """Return `key=value` as `load` takes it."""
    return f"{key}={write_yaml(value)}"


def _tree(path: str, of: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that a recipe's file and its bases state.

    Args:
        path: path or address of the file.
        of: files whose base it is, or the base of their base.
    """
    if path in of:
        raise RaydetError(f"recipe {path}: base: it is its own base: {' → '.join((*of, path))}")
    tree = _read(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RaydetError(f"recipe {path}: base: give the name of a recipe or a YAML file, not {base!r}")
    if base not in shipped() and not is_uri(base):
        base = str(join(above(path)[0], base))
    try:
        below = _tree(_file(base), (*of, path))
    except RaydetError as error:
        raise error if of else RaydetError(f"recipe {path}: base: {error}") from None
    below.pop("name", None)
    return _changed(below, tree)


def _file(recipe: str) -> str:
    """Return the path or address of a recipe's file."""
    path = str(shipped().get(recipe, recipe))
    folder, name = above(path)
    if Store(folder).kind(name) != "file":
        raise RaydetError(
            f"{recipe} is neither a recipe of raydet{did_you_mean(name, shipped())} nor a YAML file "
            "(raydet recipes lists the former)"
        )
    return path


def _changed(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings with those of another on top."""
    loss = changes.get("loss")
    if isinstance(loss, Mapping) and "name" in loss and isinstance(base.get("loss", {}), Mapping):
        base["loss"] = _whole_loss(base.get("loss", {}))
        _drop_strange_arguments(base["loss"], str(loss["name"]))
    both = {key: {**base[key], **value} for key, value in changes.items() if _are_sections(base.get(key), value)}
    return {**base, **changes, **both}


def _are_sections(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _read(path: str) -> dict[str, Any]:
    folder, name = above(path)
    try:
        tree = read_yaml(Store(folder).text(name), _texts() | _lists_of_texts())
    except yaml.YAMLError as error:
        raise RaydetError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RaydetError(f"recipe {path} holds no settings: it should be `section:` with `key: value` below")
    if "names" in tree or isinstance(tree.get("train"), str | list):
        raise RaydetError(f"{path} describes a data set and is no recipe: name its folder, {folder}")
    return tree


def _override(tree: dict[str, Any], given: str) -> None:
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise RaydetError(f"{given!r} is not an override: write section.key=value, such as train.epochs=10")
    *sections, last = key.strip().split(".")
    for depth, section in enumerate(sections, 1):
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict) or ".".join(sections[:depth]) in _values():
            raise RaydetError(f"{key}: no such setting; {section} is a value, not a section")
        tree = inner
    try:
        words = _texts() | _lists_of_texts()
        tree[last] = _as_typed(text) if key.strip() in _texts() else read_yaml(text, words, key.strip())
    except yaml.YAMLError:
        raise RaydetError(f"{given!r}: the value is not YAML; quote it") from None
    if key.strip() == "loss.name":
        _drop_strange_arguments(tree, str(tree[last]))


def _as_typed(text: str) -> str | None:
    """Return the value of a setting that is text: what was typed, but for `null`, nothing, and what is in quotes."""
    text = text.strip()
    if text.startswith(("'", '"')):
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(text)
            return value if isinstance(value, str) else text
    return None if text.lower() in ("", "~", "null") else text


def _whole_loss(loss: Any) -> Any:
    """Add the defaults of a loss of raydet's: another loss keeps the arguments that both have, also at the default."""
    kind = LOSSES.get(loss_kind(loss) or "")
    return {**kind().model_dump(mode="json"), **loss} if kind and isinstance(loss, Mapping) else loss


def _drop_strange_arguments(loss: dict[str, Any], name: str) -> None:
    """Drop the arguments of another loss in the recipe that this loss does not have."""
    if is_own(name):
        kind = locate(name, "loss.name")
        strange = [key for key in loss if key != "name" and not accepts(kind, key)]
    else:
        known = LOSSES[name].model_fields if name in LOSSES else loss
        strange = [key for key in loss if key not in known]
    for key in strange:
        del loss[key]


def _validate(tree: Mapping[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"] if part not in (*LOSSES, "OwnLoss"))
            if problem["type"] == "extra_forbidden":
                other = "; it is an argument of another loss" if key in _keys() else did_you_mean(key, _keys())
                problems.append(f"{key}: no such setting{other}")
            elif problem["type"] == "no_such_loss":
                given = problem["input"].get("name") if isinstance(problem["input"], Mapping) else problem["input"]
                problems.append(f"{key}.{problem['msg']}, not {given!r}")
            else:
                # What is wrong with several settings of a section at once has all of the section for its input.
                whole = problem["type"] == "value_error" and isinstance(problem["input"], Mapping | Section)
                given = "" if whole else f", not {problem['input']!r}"
                problems.append(f"{key}{': ' * bool(key)}{problem['msg']}{given}")
        raise RaydetError(f"{source}: {'; '.join(problems)}") from None


def _texts() -> frozenset[str]:
    """Return the settings that are text: there 2017 and no are words."""
    return _settings_of((str, str | None))


def _lists_of_texts() -> frozenset[str]:
    """Return the settings that are lists of text."""
    return _settings_of((list[str] | None,))


@cache
def _settings_of(kinds: tuple[Any, ...]) -> frozenset[str]:
    """Return the settings of some types."""
    sections: dict[str, type[Section]] = {"": Recipe, "loss.": OwnLoss}
    sections |= {f"{name}.": type(value) for name, value in Recipe() if isinstance(value, Section) and name != "loss"}
    return frozenset(
        prefix + key
        for prefix, section in sections.items()
        for key, field in section.model_fields.items()
        if field.annotation in kinds
    )


@cache
def _values() -> tuple[str, ...]:
    """Return the settings that have a value, and nothing below."""
    losses = [f"loss.{key}" for kind in LOSSES.values() for key in kind.model_fields]
    return (*flat(Recipe().model_dump()), *losses)


def _keys() -> tuple[str, ...]:
    return (*Recipe.model_fields, *_values())
