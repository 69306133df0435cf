"""Long arrays of JSON: read in pieces they are what a parser that reads all at once makes of them, or are refused."""

from __future__ import annotations

import json
import math
import threading
import time
import tracemalloc
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from guardserve.service import array_text
from guardserve.service.array_text import ArrayText, cut_arrays
from guardserve.service.datatypes import decode_json

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
NUMBERS = {
    torch.float32: st.floats(width=32),
    torch.float64: st.floats(),
    torch.int64: st.integers(-(2**63), 2**63 - 1),
    torch.uint8: st.integers(0, 255),
    torch.bool: st.booleans(),
}
SPACES = st.sampled_from(["", " ", "\n", "\t \r\n"])


def read(text: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Read an array as a long one is, in very small pieces."""
    data = text.encode()
    with mock.patch.object(array_text, "PIECE", 100):
        return decode_json(ArrayText(data, 0, len(data)), dtype, shape)


def nested(values: list[str], shape: list[int], space: str) -> str:
    """Write values nested like a shape."""
    if len(shape) > 1:
        size = math.prod(shape[1:])
        values = [nested(values[i * size : (i + 1) * size], shape[1:], space) for i in range(shape[0])]
    return f"[{space}" + f"{space},{space}".join(values) + f"{space}]"


@given(st.data())
def test_every_array_is_read_as_it_is_at_once(data: st.DataObject) -> None:
    """Flat or nested, of every type, with whitespace anywhere, wherever the pieces begin."""
    dtype = data.draw(st.sampled_from(list(NUMBERS)))
    shape = data.draw(SHAPES)
    values = data.draw(st.lists(NUMBERS[dtype], min_size=math.prod(shape), max_size=math.prod(shape)))
    written = shape if data.draw(st.booleans()) else [len(values)]
    text = nested(list(map(json.dumps, values)), written, data.draw(SPACES))
    expected = decode_json(json.loads(text), dtype, shape)
    found = read(text, dtype, shape)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@given(
    st.text("[[]],,,11 2-.eN\t", max_size=30).map(lambda middle: f"[{middle}]"),
    st.sampled_from([[1], [3], [2, 2], [1, 2], [2, 1], [2, 1, 2]]),
)
@example("[[1,2],3[,4]]", [2, 2])
@example("[[1,2]3,[,4]]", [2, 2])
@example("[[1,]2,[3,4]]", [2, 2])
@example("[1 2,[3],[4]]", [2, 2])
@example("[1,2,]", [2])
@example("[,1,2]", [2])
@example("[1,,2]", [3])
@example("[[1],[2]]]", [2, 1])
@example("[[1]]", [1])
def test_what_is_no_array_or_none_of_the_shape_is_refused(text: str, shape: list[int]) -> None:
    """Exactly where a parser of all at once refuses it."""
    try:
        parsed = json.loads(text)
        expected = decode_json(parsed, torch.float32, shape)
    except (ValueError, RecursionError):
        with pytest.raises(ValueError, match=r".+"):
            read(text, torch.float32, shape)
    else:
        assert torch.equal(read(text, torch.float32, shape).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("change", ["1", ",", "[", "]", " ", "x", "{", "null", "true", "1e999", "9" * 50])
@pytest.mark.parametrize("shape", [[80], [10, 8], [80, 1]])
def test_one_fault_anywhere_in_an_array_is_found(change: str, shape: list[int]) -> None:
    """In any piece, and at its borders: the answer is that of a parser of all at once."""
    text = nested(list(map(str, range(10, 90))), shape, "")
    for at in range(1, len(text), 3 if change.isdigit() else 1):
        faulty = text[:at] + change + text[at:]
        try:
            expected = decode_json(json.loads(faulty, parse_float=array_text.finite), torch.float64, shape)
        except ValueError:
            with pytest.raises(ValueError, match=r".+"):
                read(faulty, torch.float64, shape)
        else:
            assert torch.equal(read(faulty, torch.float64, shape), expected)


def test_a_value_that_does_not_fit_is_named_by_its_place_in_the_whole() -> None:
    """Not by that in its piece."""
    values = ["1"] * 100
    for bad, dtype in (("1.5", torch.int64), ("1e39", torch.float32), ("null", torch.float64), ("1", torch.bool)):
        written = ["true"] * 100 if dtype is torch.bool else values
        text = nested([*written[:77], bad, *written[78:]], [100], "")
        with pytest.raises(ValueError, match="the value at index 77 is "):
            read(text, dtype, [100])


@pytest.mark.parametrize(("given", "shape"), [(99, [100]), (101, [100]), (99, [10, 10]), (3, [2**60, 4])])
def test_another_number_of_values_is_refused(given: int, shape: list[int]) -> None:
    """Too few, too many, or so many that there is no memory for them."""
    with pytest.raises(
        ValueError, match=f"{given} values, but shape|more than the|does not hold the|not made of lists"
    ):
        read(nested(["1.25"] * given, [given], ""), torch.float32, shape)


def test_what_follows_more_values_than_the_shape_takes_is_not_read() -> None:
    """A few kilobytes of gzip are millions of values, which take seconds: the first that is too many ends it."""
    text = b"[" + b",".join([b"0"] * 2**20) + b"]"
    with (
        mock.patch.object(array_text, "parse_numbers", wraps=array_text.parse_numbers) as parse,
        pytest.raises(ValueError, match="data holds more than the 100000 values"),
    ):
        decode_json(ArrayText(text, 0, len(text)), torch.float32, [100_000])
    assert parse.call_count == 100_000 * len(b"0,") // array_text.PIECE + 1


def test_the_memory_is_told_of_before_it_is_taken() -> None:
    """It is that of the tensor; what is refused takes none."""
    text = b"[" + b",".join([b"1"] * 2**20) + b"]"
    told: list[int] = []
    decode_json(ArrayText(text, 0, len(text)), torch.float32, [2**20], told.append)
    assert told == [4 * 2**20] + [0] * (len(told) - 1), "and between its pieces others may go first"
    assert len(told) > 16

    def refuse(size: int) -> None:
        raise MemoryError(size)

    tracemalloc.start()
    try:
        with pytest.raises(MemoryError):
            decode_json(ArrayText(text, 0, len(text)), torch.float32, [2**20], refuse)
        assert tracemalloc.get_traced_memory()[1] < 2**16
        tracemalloc.reset_peak()
        decode_json(ArrayText(text, 0, len(text)), torch.float32, [2**20])
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20, "a list of it would take 8 MiB by itself"
    finally:
        tracemalloc.stop()


def test_other_threads_go_on_while_a_long_array_is_read() -> None:
    """None waits for more than a piece and the interpreter's turns, of however many megabytes of NaN."""
    text = b"[" + b",".join([b"NaN"] * 2**22) + b"]"
    ended = threading.Event()
    waits: list[float] = []

    def watch() -> None:
        while not ended.is_set():
            began = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    decode_json(ArrayText(text, 0, len(text)), torch.float32, [2**22])
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    assert len(waits) > 10
    assert sorted(waits)[len(waits) // 2] < seconds / 4


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('{"inputs": [{"data": [1, 2], "name": "x"}]}', 1),
        ('{"inputs":[{"name":"x","data"\n:\t[[1],[2]] }, {"data":[3] , "a": "data"}]}', 2),
        ('{"id": "\\"data\\": [1, 2]", "inputs": [{"data": [true]}]}', 1),
        ('{"data": {"data": [1, [2, []]]}}', 1),
        ('{"data": ["1", 2], "b": {"data": [{}, 2]}, "data": "data"}', 0),
        ('{"\\"data": [1], "x": ["data"]}', 1),
    ],
)
def test_cutting_the_arrays_out_and_putting_them_back_is_the_identity(text: str, count: int) -> None:
    """Strings that look like data are left alone, and so is data that is no array of numbers."""
    body = text.encode()
    rest, arrays = cut_arrays(body, len(body), 1000)
    for mark, array in arrays.items():
        rest = rest.replace(b'"%b"' % mark.encode(), json.dumps(array.whole()).encode())
    assert json.loads(rest) == json.loads(text)
    assert len(arrays) == count


def test_an_array_of_lists_and_strings_is_not_cut_in_its_midst() -> None:
    """It is no tensor's, and left where it is."""
    for body in (b'{"data":[[1],"x"]}', b'{"a":{"data":[[1],[2],"d"],"b":1}}', b'{"data":[[1],{"b":[2]}]}'):
        assert cut_arrays(body, len(body), len(body)) == (body, {})
