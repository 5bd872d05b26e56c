"""What a worker refuses when it sees the model's attention layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attention_plugins.vllm_adapter.worker import _refuse_variants


def layer(**impl: Any) -> SimpleNamespace:
    plain = {"sinks": None, "alibi_slopes": None, "kv_sharing_target_layer_name": None, "sliding_window": -1}
    return SimpleNamespace(layer_name="layers.3.attn", impl=SimpleNamespace(**{**plain, **impl}))


@pytest.mark.parametrize("window", [-1, (-1, -1)])
def test_plain_attention_is_taken(window: Any) -> None:
    _refuse_variants(layer(sliding_window=window))


@pytest.mark.parametrize(
    ("impl", "named"),
    [
        ({"sinks": [0.1]}, "sinks"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "layers.1.attn"}, "shared"),
        ({"sliding_window": 1023}, "sliding window"),
        ({"sliding_window": (1023, 0)}, "sliding window"),
    ],
)
def test_variants_are_refused_by_name(impl: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"layers\.3\.attn.*{named}"):
        _refuse_variants(layer(**impl))
