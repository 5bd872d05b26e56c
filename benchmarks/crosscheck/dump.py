"""The other side: one prefill with transformers, and what each press of kvpress keeps of it.

Runs in the environment of `requirements.txt`, as `python -m benchmarks.crosscheck.dump MODEL PROMPTS OUT`; nothing of
Longreach but plain data is imported.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.crosscheck.cases import CASES, FUTURE, Case, gates


class PlainValues(kvpress.CriticalKVPress):
    """CriticalKV with the L1 norm of values instead of that of projected values: ours, to see the rest alone."""

    @staticmethod
    def vwl1norm(values: torch.Tensor, module: Any) -> torch.Tensor:
        return values.abs().sum(-1)


class GivenPattern(kvpress.DuoAttentionPress):
    """DuoAttention with a given pattern: the published ones are fetched from the network, and not for this model."""

    def post_init_from_model(self, model: Any) -> None:
        pattern = torch.tensor(gates(), dtype=torch.float64)
        streaming = pattern.flatten().argsort()[: round(pattern.numel() * self.head_compression_ratio)]
        self.sink_size, self.recent_size = 64, 256
        self.streaming_mask = torch.zeros(pattern.numel(), dtype=torch.bool)
        self.streaming_mask[streaming] = True
        self.streaming_mask = self.streaming_mask.view_as(pattern)


OWN = {"PlainValues": PlainValues, "GivenPattern": GivenPattern}


def build(spec: dict[str, Any], keep: float) -> Any:
    """A press from its description; the innermost one gets the compression ratio."""
    arguments = dict(spec)
    name = arguments.pop("class")
    kind = OWN.get(name) or getattr(kvpress, name)
    if "press" in arguments:
        arguments["press"] = build(arguments["press"], keep)
    elif name != "GivenPattern":
        arguments["compression_ratio"] = 1 - keep
    return kind(**arguments)


def kept_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Where the rows of `after` [H, k, d] stand in `before` [H, n, d]: bool [H, n]."""
    weights = torch.randint(1, 1 << 30, before.shape[-1:], generator=torch.Generator().manual_seed(0))
    prints = [(rows.view(torch.int32).long() * weights).sum(-1) for rows in (before, after)]
    mask = torch.stack([torch.isin(full, part) for full, part in zip(*prints, strict=True)])
    if not (mask.sum(-1) == after.shape[1]).all():
        raise RuntimeError("two tokens have the same key: kept tokens can't be told from keys")
    return mask


class Recorder:
    """A forward hook for every attention layer; nothing is compressed, so all layers see the whole prompt."""

    def __init__(self, model: Any, cases: list[Case]) -> None:
        self.presses = [(case, build(case.press, case.keep)) for case in cases]
        self.found: dict[str, list[torch.Tensor]] = {}
        for _, press in self.presses:
            press.post_init_from_model(model)
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb  # some presses expect it there
            layer.self_attn.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, cache = kwargs["hidden_states"], kwargs["past_key_values"].layers[module.layer_idx]
        keys, values = cache.keys, cache.values
        queries = module.q_proj(hidden).view(*hidden.shape[:2], -1, module.head_dim).transpose(1, 2)
        queries = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])[0]
        for name, tensor in (("keys", keys[0]), ("values", values[0]), ("queries", queries[0].transpose(0, 1))):
            self.found.setdefault(name, []).append(tensor.clone())
        attentions = None
        for case, press in self.presses:
            if case.attentions and attentions is None:
                attentions = causal_attention(queries, keys, module.scaling)
            module.masked_key_indices = None
            given = attentions if case.attentions else None
            after = press.compress(module, hidden, keys.clone(), values.clone(), given, kwargs)[0]
            if module.masked_key_indices is None:
                mask = kept_rows(keys[0], after[0])
            else:  # presses whose heads differ in length mask tokens instead of dropping them
                mask = torch.ones(keys.shape[1:3], dtype=torch.bool)
                mask[module.masked_key_indices[1], module.masked_key_indices[2]] = False
                module.masked_key_indices = None
            self.found.setdefault(case.name, []).append(mask)


def causal_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, num_heads, n, n], as transformers' eager attention has it."""
    group = queries.shape[1] // keys.shape[1]
    logits = queries @ keys.repeat_interleave(group, 1).transpose(2, 3) * scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill_(future, float("-inf")).softmax(-1)


def rotary_table(model: Any, positions: int) -> torch.Tensor:
    """Cosines of all pairs, then sines, by position: float32 [positions, head_dim]."""
    cosines, sines = model.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    return torch.cat((cosines[0, :, :half], sines[0, :, :half]), -1)


@torch.inference_mode()
def main(model_path: str, prompts_file: str, out: str) -> None:
    """Write `OUT/versions.json`, and for every prompt `OUT/INDEX.safetensors`: keys, values, queries, kept masks and
    the model's rotation."""
    transformers.utils.logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    recorder = Recorder(model, CASES)
    for index, tokens in enumerate(json.loads(Path(prompts_file).read_text(encoding="utf-8"))):
        recorder.found = {}
        model.model(torch.tensor([tokens]), past_key_values=DynamicCache(), use_cache=True)
        found = {name: torch.stack(layers).contiguous() for name, layers in recorder.found.items()}
        found["rotary"] = rotary_table(model, len(tokens) + FUTURE)
        save_file(found, str(Path(out) / f"{index}.safetensors"))
        print(f"kvpress: document {index}, {len(tokens)} tokens", file=sys.stderr, flush=True)
    versions = {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__}
    (Path(out) / "versions.json").write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
