"""YAML as a person reads it: a part of YAML 1.1 in which nothing is taken for something else.

What PyYAML writes comes back as it was: plain scalars that are no numbers here are strings here and there.
"""

import re
from typing import Any

import yaml

# Nodes of a document with its aliases written out; a configuration has hundreds.
MAX_NODES = 20_000


class _Loader(yaml.SafeLoader):
    """Booleans, nulls, decimal and hexadecimal integers, floats; no octal, binary or sexagesimal number, no date."""

    # Of their own, as those of the parent belong to all of PyYAML.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern]]] = {}

    def get_single_node(self) -> yaml.Node | None:
        """The document. Raises yaml.YAMLError as `_check`."""
        node = super().get_single_node()
        if node is not None:
            _check(node, {})
        return node


_BOOLEAN = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
for _tag, _pattern, _first in (
    ("bool", rf"^(?:{_BOOLEAN})$", "yYnNtTfFoO"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("merge", r"^(?:<<)$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _check(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many nodes there are with every alias replaced by what it means; `sizes` holds what is known already.

    Raises yaml.YAMLError: more than `MAX_NODES`, a node within itself, or a key that stands twice in one mapping.
    """
    if id(node) not in sizes:
        sizes[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in children:
                if (key.tag, str(key.value)) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add((key.tag, str(key.value)))
            children = [part for pair in children for part in pair]
        sizes[id(node)] = 1 + sum(_check(child, sizes) for child in children)
    size = sizes[id(node)]
    if size is None or size > MAX_NODES:
        what = "contains itself" if size is None else f"has more than {MAX_NODES} values"
        raise yaml.YAMLError(f"with its aliases written out the document {what}")
    return size


def parse_yaml(text: str) -> Any:
    """A YAML document as plain values.

    Raises:
        ValueError: it is not valid YAML, a key stands twice in one mapping, or aliases make it huge.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: an integer of thousands of digits
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
