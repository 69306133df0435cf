"""Members that stand twice in one object: none of a request is silently dropped."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guardserve.service.body import MAX_WHOLE, ProtocolError, load_json
from guardserve.service.duplicates import duplicate, surely_unique

TENSOR = b'{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,2,3]%b}'
PLAIN = TENSOR % b""
LONG = b"[" + b",".join([b"1.5"] * MAX_WHOLE) + b"]"


class Members(tuple[tuple[str, Any], ...]):
    """What stands in an object, in order, perhaps twice."""

    __slots__ = ()


NAMES = st.sampled_from(["a", "b", "a:", '"', "\\", "\\:", "", "data", "é"])
VALUES = st.recursive(
    st.none() | st.integers(0, 9) | st.sampled_from(["", ":", '"', "\\", '\\":', ',"a":']),
    lambda values: st.lists(values, max_size=3) | st.lists(st.tuples(NAMES, values), max_size=3).map(Members),
    max_leaves=8,
)


def written(value: object, *, escaped: bool) -> str:
    """Write JSON, with whatever stands twice."""
    if isinstance(value, Members):
        parts = [f"{json.dumps(name, ensure_ascii=escaped)} : {written(v, escaped=escaped)}" for name, v in value]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(part, escaped=escaped) for part in value) + "]"
    return json.dumps(value)


def has_twice(value: object) -> bool:
    """Tell whether an object has a member twice."""
    if isinstance(value, Members):
        return len(dict(value)) < len(value) or any(has_twice(part) for _, part in value)
    return isinstance(value, list) and any(map(has_twice, value))


@given(VALUES, st.booleans())
@example(Members([("a", Members([("b", "x")])), ("a", 2)]), True)
@example(Members([("a", ":"), ("b", Members([("a", 1)]))]), True)
def test_exactly_what_has_a_member_twice_is_found(value: object, escaped: bool) -> None:
    """Whatever is in names and strings; and nothing is sure to be without that has one."""
    text = written(value, escaped=escaped).encode()
    twice = has_twice(value)
    assert (duplicate(text, len(text)) is not None) == twice
    if isinstance(value, Members) and surely_unique(text, len(text), orjson.loads(text)):
        assert not twice


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"inputs":[],"inputs":[%b]}' % PLAIN, "inputs"),
        (b'{"inputs":[%b],"parameters":{"timeout":1},"parameters":{}}' % PLAIN, "parameters"),
        (b'{"inputs":[%b],"parameters":{"timeout":1,"timeout":2}}' % PLAIN, "timeout"),
        (b'{"inputs":[%b],"id":"a","id":"b"}' % PLAIN, "id"),
        (b'{"inputs":[%b],"outputs":[{"name":"a","name":"b"}]}' % PLAIN, "name"),
        (b'{"inputs":[%b],"more":{"of":{"a":1,"a":1}}}' % PLAIN, "a"),
        (b'{"id":"a:b","inputs":[%b]}' % (TENSOR % b',"shape":[3,1]'), "shape"),
        (b'{"inputs":[%b]}' % (TENSOR % b',"n\\u0061me":"y"'), "name"),
        (b'{"inputs":[%b]}' % (TENSOR % b',"data":[NaN,2,3]'), "data"),
        (b'{"inputs":[%b]}' % (TENSOR % (b',"data":' + LONG)), "data"),
        (b'{"inputs":[{"name":"x","data":%b,"name":"y"}]}' % LONG, "name"),
    ],
)
def test_a_request_with_a_member_twice_is_refused(body: bytes, name: str) -> None:
    """However long it is: the parser would keep the last, and which of them was meant nobody knows."""
    with pytest.raises(
        ProtocolError, match=f"the member '{name}' stands twice in one object of the request: "
    ) as caught:
        load_json(body, len(body))
    assert (caught.value.status, caught.value.reason) == (400, "malformed")


@pytest.mark.parametrize("data", [b"[1,2,3]", LONG])
def test_members_that_only_look_alike_are_read(data: bytes) -> None:
    """Those of different objects, with colons, quotes and names in their strings, and below what the protocol has."""
    tensors = [{"name": name, "data": [0], "parameters": {"a": 1}} for name in ("x:0", 'x":0', "data", "\\", "é")]
    request = {"id": '"id":1', "inputs": tensors, "more": {"more": {"more": {"more": ["id", {"id": 1}]}}}}
    for escaped in (True, False):
        body = json.dumps(request, ensure_ascii=escaped).encode().replace(b"[0]", data, 1)
        read = load_json(body, len(body))
        assert isinstance(read, dict)
        assert read["inputs"][1:] == tensors[1:]
        assert (read["id"], read["more"]) == (request["id"], request["more"])


def test_objects_too_deep_to_be_looked_through_are_refused() -> None:
    """Far deeper than any that mean something."""
    for depth, fits in ((300, True), (2000, False)):
        body = b'{"a":' * depth + b"1" + b"}" * depth
        if fits:
            assert load_json(body, len(body)) == orjson.loads(body)
        else:
            with pytest.raises(ProtocolError, match="nested too deeply"):
                load_json(body, len(body))


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[],"meta":{"data":[[1],"x"]}}',
        b'{"id":"a:b","inputs":[{"data":[[1],"x"]}]}',
        b'{"id":"a:b","z":' + b"[" * 300 + b"]" * 300 + b"}",
    ],
)
def test_a_colon_in_a_string_makes_no_difference_to_what_is_json(body: bytes) -> None:
    """Such are looked through by another parser, which must take whatever the first one does."""
    assert load_json(body, len(body)) == orjson.loads(body)


def test_the_member_that_stands_twice_is_named_as_it_reads() -> None:
    """Whatever is escaped in it, or in another."""
    for body, name in (
        (rb'{"\u00e9x":1,"b":1,"b":2}', "'b'"),
        (rb'{"a\\b":1,"a\\b":2}', r"'a\\b'"),
        (b'{"parameters":"aaaaaaaa","inputs":[],"inputs":[]}', "'inputs'"),
    ):
        with pytest.raises(ProtocolError, match=re.escape(f"the member {name} stands twice")):
            load_json(body, len(body))
