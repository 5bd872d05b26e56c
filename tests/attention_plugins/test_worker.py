"""What a worker refuses when it sees the model's attention layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attention_plugins.vllm_adapter.cpu_backend import CPUCompressedImpl
from attention_plugins.vllm_adapter.layers import refuse_variants


def layer(**given: Any) -> SimpleNamespace:
    impl: Any = CPUCompressedImpl.__new__(CPUCompressedImpl)
    plain = {"sinks": None, "alibi_slopes": None, "kv_sharing_target_layer_name": None, "sliding_window": -1}
    for name, value in {**plain, "logits_soft_cap": 0, **given}.items():
        setattr(impl, name, value)
    return SimpleNamespace(layer_name="layers.3.attn", impl=impl)


@pytest.mark.parametrize("window", [-1, (-1, -1)])
def test_plain_attention_is_taken(window: Any) -> None:
    refuse_variants(layer(sliding_window=window), selectors=True)


@pytest.mark.parametrize("given", [{"sinks": [0.1]}, {"logits_soft_cap": 50.0}], ids=["sinks", "soft cap"])
def test_selectors_do_not_know_all_that_policies_do(given: dict[str, Any], request: pytest.FixtureRequest) -> None:
    refuse_variants(layer(**given), selectors=False)
    with pytest.raises(ValueError, match=rf"layers\.3\.attn.*{request.node.callspec.id}.*selectors"):
        refuse_variants(layer(**given), selectors=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "layers.1.attn"}, "shared"),
        ({"sliding_window": 1023}, "sliding window"),
        ({"sliding_window": (1023, 0)}, "sliding window"),
    ],
)
def test_variants_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"layers\.3\.attn.*{named}"):
        refuse_variants(layer(**given), selectors=False)


def test_a_backend_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.attn has an attention backend of its own"):
        refuse_variants(SimpleNamespace(layer_name="layers.3.attn", impl=SimpleNamespace()), selectors=False)
