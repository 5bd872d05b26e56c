"""Which policies there are, and how a request's words become one of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ValidationError

from kvcache.allocators.adakv import AdaHeads
from kvcache.allocators.base import EqualHeads, HeadAllocator, LayerAllocator, UniformLayers
from kvcache.allocators.d2o import D2OLayers
from kvcache.allocators.pyramid import PyramidLayers
from kvcache.allocators.zigzag import ZigZagLayers
from kvcache.allocators.zipvl import ZipVLLayers
from kvcache.choosing import with_packages
from kvcache.kept_positions import REPORT, wanted
from kvcache.method import PolicyError as PolicyError
from kvcache.method import explain
from kvcache.policies.adakv import AdaKV
from kvcache.policies.base import Policy
from kvcache.policies.criticalkv import CriticalKV
from kvcache.policies.d2o import D2O
from kvcache.policies.duoattention import DuoAttention
from kvcache.policies.expectedattention import ExpectedAttention
from kvcache.policies.h2o import H2O
from kvcache.policies.keydiff import KeyDiff
from kvcache.policies.l2norm import L2Norm
from kvcache.policies.lfa import LFA
from kvcache.policies.lra import LRA
from kvcache.policies.namm import NAMM
from kvcache.policies.observedattention import ObservedAttention
from kvcache.policies.pyramidkv import PyramidKV
from kvcache.policies.raas import RaaS
from kvcache.policies.random import Random
from kvcache.policies.rkv import RKV
from kvcache.policies.snapkv import SnapKV
from kvcache.policies.streamingllm import StreamingLLM
from kvcache.policies.tova import TOVA
from kvcache.policies.zigzagkv import ZigZagKV

NONE = "none"
BUILT_IN: tuple[type[Policy], ...] = (
    StreamingLLM, L2Norm, KeyDiff, SnapKV, PyramidKV, ZigZagKV, AdaKV, CriticalKV, TOVA, H2O, ObservedAttention, D2O,
    ExpectedAttention, RKV, LRA, LFA, RaaS, NAMM, DuoAttention, Random,
)  # fmt: skip
LAYERS: dict[str, type[LayerAllocator]] = {
    part.name: part for part in (UniformLayers, PyramidLayers, ZigZagLayers, ZipVLLayers, D2OLayers)
}
HEADS: dict[str, type[HeadAllocator]] = {part.name: part for part in (EqualHeads, AdaHeads)}
PARTS: dict[str, dict[str, type[Any]]] = {"layers": LAYERS, "heads": HEADS}
"""What a request may choose beside a policy, by the field that names it."""
ENTRY_POINT_GROUP = "longreach.policies"


@cache
def policies() -> dict[str, type[Policy]]:
    """All policies by name, `none` not among them: ours, then those of installed packages.

    Raises:
        ValueError: when a package's entry point is no policy or takes a name that is in use.
    """
    return with_packages(Policy, BUILT_IN, ENTRY_POINT_GROUP, NONE)  # type: ignore[type-abstract]


def make_policy(words: dict[str, Any]) -> Policy | None:
    """Build the policy that a request or the command line asks for.

    Args:
        words: `{"policy": name, **arguments}`, as in a request's `kv_cache` field; its `report` is checked and left.

    Returns:
        The policy, or None for `none`.

    Raises:
        PolicyError: an unknown name or argument, or a bad value; says which and what is allowed.
    """
    if not isinstance(words, dict):
        raise PolicyError("kv_cache", f"must be an object, got {words!r}.", '{"policy": NAME, ...}')
    name = words.get("policy")
    if name == NONE:
        if extra := sorted(set(words) - {"policy"}):
            raise PolicyError(f"kv_cache.{extra[0]}", "the policy 'none' takes no arguments.", "no further fields")
        return None
    policy = policy_class(words)
    wanted(words)
    arguments = {k: v for k, v in words.items() if k not in ("policy", REPORT, *PARTS)}
    always = policy.Args.model_json_schema()["properties"].get("interval", {}).get("minimum", 0) > 0
    if "interval" in policy.Args.model_fields and not always and not policy.repeats():
        arguments.setdefault("interval", 0)  # with other allocators a policy may lose what it does by default
    try:
        made = policy(policy.Args.model_validate(arguments))
    except ValidationError as error:
        raise explain("kv_cache", policy.name, policy.Args, [*takes(policy), REPORT], error) from None
    if interval := getattr(made.args, "interval", 0):
        if not policy.repeats():
            raise _compacts_no_answers(policy, always)
        if interval < made.least_interval:
            problem = f"{interval} tokens are fewer than {policy.name} watches of each interval."
            raise PolicyError("kv_cache.interval", problem, f"{'' if always else '0 or '}>= {made.least_interval}")
    return made


def _compacts_no_answers(policy: type[Policy], always: bool) -> PolicyError:
    """Names the interval, or, where there is always one, the allocator that stands against it."""
    unequal = policy.heads is not EqualHeads
    why = "its heads differ in length" if unequal else "what it needs is of prompts only"
    problem = f"{policy.name} can't compact answers: {why}."
    if not always:
        return PolicyError("kv_cache.interval", problem, "0")
    if unequal:
        return PolicyError("kv_cache.heads", problem, EqualHeads.name)
    others = [name for name, part in LAYERS.items() if _variant(policy, part, policy.heads).repeats()]
    return PolicyError("kv_cache.layers", problem, ", ".join(others))


def policy_class(words: dict[str, Any]) -> type[Policy]:
    """The class of the policy that these words ask for, with the allocators that they name; arguments don't matter.

    Raises:
        PolicyError: an unknown policy or allocator.
    """
    name = words.get("policy")
    if not isinstance(name, str) or name not in policies():
        problem = "is missing." if "policy" not in words else f"unknown policy {name!r}."
        raise PolicyError("kv_cache.policy", problem, ", ".join([NONE, *policies()]))
    policy = policies()[name]
    chosen: dict[str, Any] = {}
    for field, known in PARTS.items():
        usual = getattr(policy, field)
        part = words.get(field, usual.name)
        if part == usual.name:  # a third party's policy may bring its own
            chosen[field] = usual
        elif policy.heads.decides_layers:
            problem = f"{policy.name} takes no other: its {policy.heads.name} say what each head keeps."
            raise PolicyError(f"kv_cache.{field}", problem, usual.name)
        elif isinstance(part, str) and part in known:
            chosen[field] = known[part]
        else:
            raise PolicyError(f"kv_cache.{field}", f"there is no such allocator: {part!r}.", ", ".join(known))
    return _variant(policy, chosen["layers"], chosen["heads"])


def takes(policy: type[Policy]) -> list[str]:
    """The fields that a request for this policy may have beside its name."""
    return [*policy.Args.model_fields, *(() if policy.heads.decides_layers else PARTS)]


@cache
def _variant(policy: type[Policy], layers: type[LayerAllocator], heads: type[HeadAllocator]) -> type[Policy]:
    if (layers, heads) == (policy.layers, policy.heads):
        return policy
    return type(policy.__name__, (policy,), {"layers": layers, "heads": heads, "__doc__": policy.__doc__})


def policy_words(policy: Policy | None) -> dict[str, Any]:
    """The inverse of `make_policy`, every argument spelled out: JSON-able."""
    if policy is None:
        return {"policy": NONE}
    usual = policies().get(policy.name, type(policy))
    parts = {
        field: getattr(policy, field).name for field in PARTS if getattr(policy, field) is not getattr(usual, field)
    }
    return {"policy": policy.name, **parts, **policy.args.model_dump(mode="json")}
