"""Models and losses of the user's own, named in a recipe as `package.module:name`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydet.errors import RaydetError, did_you_mean


def is_own(name: str) -> bool:
    """Is this a `package.module:name`, not a name of raydet's?"""
    return ":" in name


def locate(name: str, key: str) -> Any:
    """Import `package.module:name`, from the current folder or anything installed.

    Args:
        name: what the recipe says, `package.module:name`.
        key: key of the recipe that says so, for messages.

    Raises:
        RaydetError: there is no such module or nothing of that name in it, or importing it fails.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise RaydetError(f"{key}: {name!r} is not of the form package.module:name")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise RaydetError(
            f"{key}: cannot import {module_name} ({reason}); it must be installed, or lie in the current folder {here}"
        ) from error
    if not hasattr(module, attribute):
        raise RaydetError(
            f"{key}: {module.__file__ or module_name} has no {attribute}{did_you_mean(attribute, dir(module))}"
        )
    return getattr(module, attribute)


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Does a function or class take an argument of this name? A class's **settings are those of its base."""
    chain: list[Callable[..., Any]] = [function]
    if isinstance(function, type):
        chain = [vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)]
    for link in chain:
        parameters = inspect.signature(link).parameters
        if argument in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return not isinstance(function, type)


def call(function: Callable[..., Any], key: str, **arguments: Any) -> Any:
    """Call a user's function or class with arguments from the recipe.

    Raises:
        RaydetError: it does not take them, or needs others.
    """
    name = f"{key}: {getattr(function, '__name__', function)}{inspect.signature(function)}"
    strange = [argument for argument in arguments if not accepts(function, argument)]
    if strange:
        raise RaydetError(f"{name} takes no {' and no '.join(strange)}")
    try:
        inspect.signature(function).bind(**arguments)
        return function(**arguments)
    except (TypeError, ValueError) as error:
        raise RaydetError(f"{name}: {error}") from error
