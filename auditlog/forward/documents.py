"""YAML documents as plain data, in which a scalar is the text that was written.

So reads Talos them where a text belongs: the tag `rack: 07` is "07", and no day becomes a date.
"""

from __future__ import annotations

from typing import Any

import yaml

_WANTED = ("merge", "null")  # of what a plain scalar may mean, but a text
_STANDARD = "tag:yaml.org,2002:"
_KINDS = ("map", "seq", "str", "null")
_TEXTS = ("int", "float", "bool", "timestamp")


class Tagged:
    """A value with any other tag, such as `!vault`. What it means is not known here."""

    def __repr__(self) -> str:
        return "[tagged]"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - as the library has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(_WANTED)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        **{_STANDARD + kind: yaml.SafeLoader.yaml_constructors[_STANDARD + kind] for kind in _KINDS},
        **{_STANDARD + kind: yaml.SafeLoader.construct_yaml_str for kind in _TEXTS},
        None: lambda _loader, _node: Tagged(),
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that stands twice: what the first one has would be gone without a word."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def documents_of(content: bytes) -> list[Any]:
    """The documents of a YAML stream. Raises ValueError, which says where it is none."""
    try:
        return list(yaml.load_all(content, _Loader))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        # The message of the library quotes the line, which may hold a password.
        where = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
