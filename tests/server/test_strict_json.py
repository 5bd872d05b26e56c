"""What bodies of strangers are refused for, and what not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.strict_json import BadJSON, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_json_is_read(value: Any) -> None:
    """`text()` makes no halves of surrogate pairs."""
    assert read_json(json.dumps(value).encode(), 64) == value


@pytest.mark.parametrize(
    "body, message, param",
    [
        (b"{", "isn't JSON: Expecting property name", None),
        (b'{"a": 1} 2', "isn't JSON: Extra data", None),
        (b'{"a": NaN}', "NaN is no number", None),
        (b'{"a": [-Infinity]}', "-Infinity is no number", None),
        (b'{"a": {"b": [1, 1e999]}}', "a.b[1]: the number is too large.", "a.b[1]"),
        (b"-1e999", "The body: the number is too large.", None),
        (b"9" * 5000, "too many digits", None),
        (b'{"a": "\xff"}', "isn't UTF-8: byte 7 (0xff)", None),
        (b'{"a": ["x", "\\ud83d"]}', "a[1]: half of a surrogate pair", "a[1]"),
        (b'{"\\udc00": 1}', "The body: half of a surrogate pair", None),
        (b"[" * 100_000, "nested too deep", None),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep", None),
    ],
    ids=str,
)
def test_what_is_not_json_is_refused(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(BadJSON) as caught:
        read_json(body, 64)
    assert message in str(caught.value) and caught.value.param == param


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_the_limit_of_depth_is_exact(opening: bytes, closing: bytes) -> None:
    read_json(opening * 5 + b"1" + closing * 5, 5)
    with pytest.raises(BadJSON, match="allowed are 5 levels"):
        read_json(opening * 6 + b"1" + closing * 6, 5)
    with pytest.raises(BadJSON, match="allowed are 5 levels"):
        read_json(b"[" * 6 + b"]" * 6, 5)
