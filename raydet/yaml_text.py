"""YAML as a recipe's reader writes it: `1e-3` is a number, and what is text by its setting stays as it was typed.

YAML 1.1, which PyYAML reads, takes numbers without a point or without a sign of the exponent for text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_NULL, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
_NUMBER = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """Reads numbers as everyone writes them."""


class _Dumper(yaml.SafeDumper):
    """Puts text that looks like such a number in quotes."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _FLOAT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))


def read(text: str, texts: Collection[str], key: str = "") -> Any:
    """Return what a YAML text says.

    Args:
        text: one document.
        texts: keys, such as `data.root`, whose values are text or lists of text: there 2017, no and 1e3 are words.
        key: where the text belongs; empty: it holds all settings.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_words(node, texts, key)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def write(value: Any) -> str:
    """Return a value as YAML on one line, which `read` takes back."""
    shown: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"))
    return shown.removesuffix("...\n").strip()


def _keep_words(node: yaml.Node, texts: Collection[str], key: str) -> None:
    if isinstance(node, yaml.MappingNode):
        section = f"{key}." if key else ""
        if any(text.startswith(section) for text in texts):
            for name, value in node.value:
                _keep_words(value, texts, f"{section}{name.value}")
    elif key in texts:
        for word in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(word, yaml.ScalarNode) and word.tag != _NULL:
                word.tag = _TEXT
