"""YAML files of strangers and of our own: plain data, as YAML 1.2 reads it.

PyYAML follows YAML 1.1, where `2:4` is the number 124, `1e-3` a text and `no` false; patterns, learning rates and file
names want the newer reading. Anchors and aliases are refused: a few lines of them describe more data than memory holds.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from vlprune.errors import RequestError


LIMIT = 1 << 16  # bytes; a recipe has some hundred
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {  # no dates, sets, binary data
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "it has anchors or aliases", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return found


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _integer(loader: _Loader, node: Any) -> int:
    return int(loader.construct_scalar(node))  # decimal only


def _number(loader: _Loader, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
    if _class is _Dumper:  # quote also what other readers, who follow YAML 1.1, would take for something else
        for _first, _resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
            for _name, _regexp in _resolvers:
                _class.add_implicit_resolver(_name, _regexp, [_first])
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(path: Path | str, limit: int = LIMIT) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        limit: its size in bytes at most.

    Returns:
        Any: null, booleans, numbers, texts, lists and mappings.

    Raises:
        RequestError: it is missing, too large, or no such YAML.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device might never end
            raise RequestError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise RequestError(f"{path} has more than {limit:,} bytes: it is no file of options")
        return yaml.load(content.decode("utf-8"), _Loader)
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"cannot read {path} (not UTF-8 text)") from error
    except RecursionError as error:
        raise RequestError(f"{path} cannot be read: it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{path} is not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, KeyError) as error:  # what is tagged a number or a truth, and is none
        raise RequestError(f"{path} is not valid YAML: {error}") from error


def dump_yaml(value: Any) -> str:
    """Write data so that `read_yaml` gives it back, and readers of YAML 1.1, too.

    Args:
        value: what `read_yaml` may give; keys keep their order.

    Returns:
        str: the text of the file.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
