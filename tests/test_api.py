"""The public names and signatures are those in ``api.txt``, so no change of them is accidental.

To change one, run ``python -m tests.test_api > tests/api.txt``, and read the diff.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import types

import torchfut_aio
from torchfut_aio import debug, distributed

PROMISED = pathlib.Path(__file__).with_name("api.txt")
PROTOCOLS = {
    *("__enter__", "__exit__", "__aenter__", "__aexit__", "__await__"),
    *("__iter__", "__next__", "__aiter__", "__anext__", "__bool__", "__call__", "__len__"),
}


def signature(function):
    """Return the signature, without parameters whose names begin with an underscore."""
    found = inspect.signature(function)
    shown, kinds = [], []
    for each in found.parameters.values():
        if each.name.startswith("_") or each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not {each.kind, each.VAR_POSITIONAL} & {*kinds}:
            shown.append("*")
        if kinds and kinds[-1] is each.POSITIONAL_ONLY is not each.kind:
            shown.append("/")
        star = "*" if each.kind is each.VAR_POSITIONAL else ""
        text = f"{star}{each.name}: {each.annotation}"
        shown.append(text if each.default is each.empty else f"{text} = {each.default!r}")
        kinds.append(each.kind)
    if kinds and kinds[-1] is inspect.Parameter.POSITIONAL_ONLY:
        shown.append("/")
    return f"({', '.join(shown)}) -> {found.return_annotation}"


def is_ours(kind):
    return kind.__module__.partition(".")[0] == "torchfut_aio"


def base_name(kind):
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library == "builtins" else f"{library}.{kind.__name__}"


def members_of(kind):
    found = {}
    for base in reversed(kind.__mro__):
        if is_ours(base):
            found.update(vars(base))
    fields = {field.name for field in dataclasses.fields(kind)} if is_record(kind) else set()
    for name, member in sorted(found.items()):
        if name in PROTOCOLS or not (name.startswith("_") or name in fields):
            yield name, member


def is_record(kind):
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def field(each):
    assert each.kw_only, each.name
    default = ""
    if each.default is not dataclasses.MISSING:
        default = f" = {each.default!r}"
    elif each.default_factory is not dataclasses.MISSING:
        default = f" = {each.default_factory.__name__}()"
    return f"    {each.name}: {each.type}{default}"


def described(name, thing):
    if isinstance(thing, type) and issubclass(thing, BaseException):
        yield f"error {name}({', '.join(map(base_name, thing.__bases__))})"
        return
    if is_record(thing):
        assert thing.__dataclass_params__.frozen, name
        assert "__slots__" in vars(thing), name
        yield f"record {name}"
        yield from map(field, dataclasses.fields(thing))
    else:
        yield f"{name}{signature(thing)}"
    for member, value in members_of(thing if isinstance(thing, type) else type(thing)):
        if isinstance(value, property):
            yield f"    {member}: {inspect.signature(value.fget).return_annotation}"
        elif isinstance(inspect.unwrap(value), types.FunctionType):  # if it runs in C, too
            prefix = "async " if inspect.iscoroutinefunction(value) else ""
            yield f"    {prefix}{member}{signature(value)}"


def api():
    for module in (torchfut_aio, distributed, debug):
        yield f"# {module.__name__}"
        for name in module.__all__:
            yield from described(name, getattr(module, name))


def test_public_names_and_signatures_match_the_promised_api():
    assert [*api()] == PROMISED.read_text().splitlines(), __doc__


if __name__ == "__main__":
    print(*api(), sep="\n")
