"""Request bodies as bytes: decompression, the split by the header, and JSON."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardserve.service.body import HEADER_LENGTH, MAX_REST, MAX_WHOLE, ProtocolError, decompress, json_size, load_json

LIMIT = 1_000_000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
}


def refusal(body: bytes, encoding: str | None, limit: int = LIMIT) -> ProtocolError:
    """Return the error with which decompression refuses a body."""
    with pytest.raises(ProtocolError) as caught:
        decompress(body, encoding, limit)
    return caught.value


@pytest.mark.parametrize("encoding", [None, "", "identity", "Identity"])
def test_an_uncompressed_body_passes_up_to_the_limit(encoding: str | None) -> None:
    """Without a coding the body itself is bounded: the limit is allowed, one byte more is 413."""
    assert decompress(b"abc", encoding, 3) == b"abc"
    error = refusal(b"abcd", encoding, 3)
    assert (error.status, error.reason) == (413, "too_large")
    assert str(error) == "the body is larger than the 3 bytes allowed"


@given(
    parts=st.lists(st.binary(max_size=100), max_size=4),
    repeat=st.sampled_from([1, 500]),
    encoding=st.sampled_from(["gzip", "x-gzip", "deflate", "GZIP", " deflate "]),
)
def test_every_coding_restores_the_body_and_bounds_it_exactly(parts: list[bytes], repeat: int, encoding: str) -> None:
    """A limit of the body's own size is enough, and one byte less is 413."""
    body = b"".join(parts) * repeat
    compressed = COMPRESS[encoding.strip().lower()](body)
    assert decompress(compressed, encoding, len(body)) == body
    if body:
        assert refusal(compressed, encoding, len(body) - 1).status == 413


@given(members=st.lists(st.binary(max_size=50_000), min_size=1, max_size=5))
def test_the_members_of_a_gzip_body_are_joined(members: list[bytes]) -> None:
    """Members follow each other, empty ones too; together they are the body."""
    compressed = b"".join(gzip.compress(member) for member in members)
    assert decompress(compressed, "gzip", LIMIT) == b"".join(members)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    """A body of 64 MiB of zeros in 64 KiB is 413, at a cost near the limit."""
    bomb = gzip.compress(bytes(64 * 2**20))
    tracemalloc.start()
    try:
        error = refusal(bomb, "gzip", limit=10_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (error.status, error.reason) == (413, "too_large")
    assert peak < 2**20


def test_a_limit_spans_the_members_of_a_gzip_body() -> None:
    """Members that each fit do not get past the limit together."""
    assert refusal(gzip.compress(bytes(60)) * 2, "gzip", limit=100).status == 413


def test_an_endless_row_of_empty_members_is_refused() -> None:
    """Tiny members cost much more time than their bytes, so that their number is bounded."""
    member = gzip.compress(b"")
    assert decompress(member * 10_000, "gzip", LIMIT) == b""
    error = refusal(member * 10_001, "gzip")
    assert error.status == 400
    assert "too many members" in str(error)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_every_truncation_is_refused(encoding: str) -> None:
    """No strict prefix of a compressed body passes for a whole one."""
    compressed = COMPRESS[encoding](b"some tensor data" * 3)
    for end in range(len(compressed)):
        error = refusal(compressed[:end], encoding)
        assert (error.status, error.reason) == (400, "malformed")
        assert str(error) == "the compressed body is truncated"


@pytest.mark.parametrize("garbage", [b"\0", b"x", b"garbage that is longer than a header"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bytes_after_the_compressed_body_are_refused(encoding: str, garbage: bytes) -> None:
    """What follows the last stream is never dropped in silence."""
    error = refusal(COMPRESS[encoding](b"data") + garbage, encoding)
    assert (error.status, error.reason) == (400, "malformed")


def test_two_zlib_streams_are_refused() -> None:
    """Only gzip has members; deflate is one stream."""
    assert "11 bytes follow" in str(refusal(zlib.compress(b"abc") * 2, "deflate"))


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"plain text", "gzip"),
        (b"plain text", "deflate"),
        (zlib.compress(b"data"), "gzip"),
        (gzip.compress(b"data"), "deflate"),
        (zlib.compress(b"data")[2:-4], "deflate"),
        (gzip.compress(b"data")[:-8] + bytes(8), "gzip"),
    ],
    ids=["text as gzip", "text as deflate", "zlib as gzip", "gzip as deflate", "raw deflate", "wrong checksum"],
)
def test_corrupt_or_mislabelled_data_is_refused(body: bytes, encoding: str) -> None:
    """What is not the coding that it claims to be is 400, with zlib's reason."""
    error = refusal(body, encoding)
    assert (error.status, error.reason) == (400, "malformed")
    assert str(error).startswith(f"the body is not valid {encoding}: ")


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate", "\ud800"])
def test_an_unknown_coding_is_unsupported(encoding: str) -> None:
    """The client learns which codings it may use."""
    error = refusal(b"", encoding)
    assert (error.status, error.reason) == (415, "unsupported_encoding")
    assert str(error) == f"Content-Encoding {encoding!r} is not supported: send gzip, deflate or identity"


@pytest.mark.parametrize(("header", "size"), [(None, 5), ("5", 5), ("0", 0), ("003", 3)])
def test_the_header_gives_the_size_of_the_json(header: str | None, size: int) -> None:
    """Without the header the whole body is JSON."""
    assert json_size(b"12345", header) == size


@pytest.mark.parametrize("header", ["", "-1", "+1", "1.0", "0x1", "1_0", " 1", "1\n", "\u0663", "one", "9" * 5000])
def test_a_header_that_is_no_whole_number_is_refused(header: str) -> None:
    """Only ASCII digits count, however lenient Python's int is."""
    with pytest.raises(ProtocolError, match=f"{HEADER_LENGTH} is .*, not a whole number of bytes") as caught:
        json_size(b"12345", header)
    assert (caught.value.status, caught.value.reason) == (400, "malformed")


def test_a_header_larger_than_the_body_is_refused() -> None:
    """The message has both numbers."""
    with pytest.raises(ProtocolError, match=f"{HEADER_LENGTH} is 6, but the body has 5 bytes"):
        json_size(b"12345", "6")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{}{}",
        b"[1,]",
        b"\xff\xfe",
        b'"\xff NaN"',
        b"\xef\xbb\xbf{}",
        b"nan",
        b"1e400",
        b"[NaN, 1e400]",
        b'{"inputs": [{"data": [NaN, -1e400]}]}',
        b'["\\ud800", NaN]',
        b"[" * 100_000,
        b"[NaN," * 100_000,
        b"[" * 300 + b"NaN" + b"]" * 300,
        b"[NaN, " + b"9" * 5000 + b"]",
        b'{"inputs": 3, "id": NaN}',
        b'{"inputs": [[NaN]]}',
        b'{"inputs": [{"data": [1], "shape": [Infinity]}]}',
        b'{"inputs": [{"data": [NaN]}], "parameters": {"deep": [-Infinity]}}',
        b'{"inputs": [{"data": [NaN]}], "id": "\\ud800"}',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    """Syntax, encoding, depth, huge numbers, lone surrogates and NaN outside tensor data are all 400."""
    with pytest.raises(ProtocolError, match="the request is not valid JSON: ") as caught:
        load_json(body, len(body))
    assert (caught.value.status, caught.value.reason) == (400, "malformed")
    assert len(orjson.dumps(str(caught.value))) < 300


@pytest.mark.parametrize("text", [b"[" * 1000, b'{"inputs":[{"data":[0,' + b"[" * 1000, b"[" * 1030 + b"]" * 1030])
def test_json_that_is_nested_too_deeply_is_told_so(text: bytes) -> None:
    """Also where it is cut off, of which the parser says that its memory did not suffice."""
    with pytest.raises(
        ProtocolError, match=r"nested too deeply, .*: send data flat, .*: line 1 column [0-9]+ "
    ) as caught:
        load_json(text, len(text))
    assert "memory" not in str(caught.value)


def test_non_finite_literals_are_read_in_tensor_data() -> None:
    """Clients such as tritonclient write them there, although JSON has none."""
    body = b'{"id": "NaN", "inputs": [{"data": [[NaN], Infinity, -Infinity, 0.1, 3]}, {"name": "b"}], "outputs": []}'
    assert repr(load_json(body, len(body))) == repr(
        {
            "id": "NaN",
            "inputs": [{"data": [[float("nan")], float("inf"), float("-inf"), 0.1, 3]}, {"name": "b"}],
            "outputs": [],
        }
    )


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_each_non_finite_literal_is_read_by_itself(literal: str) -> None:
    """Any one of the three makes the body one that orjson refuses."""
    body = f'{{"inputs": [{{"data": [{literal}]}}]}}'.encode()
    assert repr(load_json(body, len(body))) == repr({"inputs": [{"data": [float(literal)]}]})


def test_only_the_start_of_the_body_is_json() -> None:
    """What follows the given size, be it NaN, plays no part."""
    assert load_json(b"{}NaN", 2) == {}
    with pytest.raises(ProtocolError, match="not valid JSON"):
        load_json(b"{]NaN", 2)


LONG = b"[" + b",".join([b"1"] * MAX_WHOLE) + b"]"
"""Data of which no list is made."""


@pytest.mark.parametrize("part", [b"[]", b"{}", b"[NaN]", b'"\\u0041"', b'"data":[', b'{"data":[]}'])
@pytest.mark.parametrize("where", [b"[%b]", b'{"id":[%b]}', b'{"inputs":[{"data":["",%b]}]}'])
def test_much_beside_the_data_of_inputs_is_refused_before_it_takes_memory(part: bytes, where: bytes) -> None:
    """413, at a cost of little more than what is allowed, where lists and objects take thirty times their text."""
    body = where % b",".join([part] * (2**23 // len(part)))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="beside arrays of numbers") as caught:
            load_json(body, len(body))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (caught.value.status, caught.value.reason) == (413, "too_large")
    assert peak < 15 * MAX_REST < len(body)


def test_as_much_beside_the_data_of_inputs_as_may_be_is_read() -> None:
    """With data of any length."""
    for size, fits in ((MAX_REST - 100, True), (MAX_REST, False)):
        body = b'{"id":"%b","inputs":[{"data":%b}]}' % (b"x" * size, LONG)
        if fits:
            request = load_json(body, len(body))
            assert isinstance(request, dict)
            assert request["id"] == "x" * size
            assert len(request["inputs"][0]["data"]) == len(LONG)
        else:
            with pytest.raises(ProtocolError, match="beside arrays of numbers"):
                load_json(body, len(body))


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[],"data":%b}',
        b'{"inputs":[{"parameters":{"data":%b}}]}',
        b'{"inputs":[{"x\\"data":%b}]}',
        b'[{"data":%b}]',
    ],
)
def test_long_data_that_is_no_inputs_is_refused(body: bytes) -> None:
    """It would be dropped without having been read."""
    body %= LONG
    with pytest.raises(ProtocolError, match="members called data that are no input's"):
        load_json(body, len(body))


@pytest.mark.parametrize("after", [b"", b",", b'"', b',"a"', b"]", b"},", b",}]}", b"}}"])
def test_long_data_that_is_not_followed_as_it_must_be_is_no_json(after: bytes) -> None:
    """Wherever the text goes wrong behind it."""
    body = b'{"inputs":[{"data":' + LONG + after
    with pytest.raises(ProtocolError):
        load_json(body, len(body))


def test_what_is_made_of_a_compressed_body_is_held_as_it_comes() -> None:
    """Before there is much more than there is room for."""
    held: list[int] = []

    def hold(size: int) -> None:
        held.append(size)
        if sum(held) > 2**20:
            raise MemoryError

    assert decompress(gzip.compress(bytes(2**20)), "gzip", 2**24, hold) == bytes(2**20)
    assert sum(held) == 2**20
    held.clear()
    with pytest.raises(MemoryError):
        decompress(gzip.compress(bytes(2**24)), "gzip", 2**24, hold)
    assert sum(held) < 2**23
    held.clear()
    assert decompress(b"abc", None, 3, hold) == b"abc"
    assert held == []
