"""Plain Python values as JSON and back: the source of this file runs inside the sandbox, behind the code under test.

Only values of exactly known types come through, so that what a test compares is data: an object whose `__eq__` always
says yes, a text that lies about its length or a list that answers differently when asked again becomes an error or the
plain value it holds. Imports stand inside the functions, where the code under test cannot have replaced them by name.
"""

from __future__ import annotations

PLAIN_TYPES = ("int", "float", "str", "bool", "list", "tuple", "dict", "set", "complex", "bytes", "frozenset", "object")
MAX_ITEMS = 100_000


def pack(value: object, depth: int = 0) -> object:
    """The value as JSON types; iterators and containers of the standard library become the plain ones they equal.

    Raises TypeError for a value that is no plain data.
    """
    import builtins
    import collections
    import decimal
    import fractions
    import itertools

    if depth > 50:
        raise TypeError("a value is nested too deeply")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["i", hex(value)]  # as text in hexadecimal: Python refuses to read long decimal numbers
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes or kind is bytearray:
        return ["b", bytes(value).hex()]
    if kind is fractions.Fraction or kind is decimal.Decimal:
        return ["F" if kind is fractions.Fraction else "D", str(value)]
    if kind is type and vars(builtins).get(value.__name__) is value and value.__name__ in PLAIN_TYPES:
        return ["y", value.__name__]
    if kind is range:
        return ["r", value.start, value.stop, value.step]
    if issubclass(kind, dict):
        return ["d", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    for tag, container in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if issubclass(kind, container):
            return [tag, [pack(item, depth + 1) for item in container.__iter__(value)]]
    if kind is collections.deque:
        return ["l", [pack(item, depth + 1) for item in value]]
    for number in (int, float, str):
        if issubclass(kind, number):
            return pack(number.__add__(value, number()), depth)
    if hasattr(kind, "__next__") or kind.__name__ in ("dict_keys", "dict_values", "dict_items"):
        return ["l", [pack(item, depth + 1) for item in itertools.islice(value, MAX_ITEMS)]]
    raise TypeError(f"a value of type {kind.__name__} is no plain data")


def unpack(packed: object) -> object:
    """The value that `pack` made JSON of; raises TypeError, ValueError or LookupError for anything else."""
    import builtins
    import decimal
    import fractions

    if packed is None or isinstance(packed, (bool, str)):
        return packed
    if not isinstance(packed, list):
        raise TypeError("not a packed value")
    tag, *rest = packed
    if tag == "i":
        return int(rest[0], 16)
    if tag == "f":
        return float.fromhex(rest[0])
    if tag == "c":
        return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
    if tag == "b":
        return bytes.fromhex(rest[0])
    if tag in ("F", "D"):
        return (fractions.Fraction if tag == "F" else decimal.Decimal)(rest[0])
    if tag == "y":
        return vars(builtins)[rest[0]] if rest[0] in PLAIN_TYPES else None
    if tag == "r":
        return range(*rest)
    if tag == "d":
        return {unpack(key): unpack(value) for key, value in rest[0]}
    return {"l": list, "t": tuple, "s": set, "z": frozenset}[tag](unpack(item) for item in rest[0])
