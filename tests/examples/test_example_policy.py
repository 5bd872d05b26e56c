"""The policy in examples/ works as a package that somebody else wrote and installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvcache.evidence import LayerEvidence
from tests.kvcache.brute_force import snapkv_votes
from tests.kvcache.synthetic import SCALE, PagedCache

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "examples" / "longreach-example-policy"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("longreach_wholechunks", PACKAGE / "longreach_wholechunks.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # pydantic looks its classes' annotations up there
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed by pip, without any network."""
    # Building writes into the source folder.
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("example") / "source")
    target = source.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=300)
    return target


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def test_the_registry_finds_it_beside_our_own(site: Path) -> None:
    code = (
        "from kvcache.registry import make_policy, policies\n"
        "policy = make_policy({'policy': 'wholechunks', 'budget': '25%', 'chunk': 10})\n"
        "print(list(policies())[-1], type(policy).__module__, policy.args.chunk, policy.minimum_budget(16))"
    )
    done = run(site, "-c", code)
    assert done.stdout.split() == ["wholechunks", "longreach_wholechunks", "10", "68"], done.stderr


def test_the_command_line_lists_it(site: Path) -> None:
    done = run(site, "-m", "server.cli", "policies")
    assert "Whole chunks by SnapKV's votes (arXiv 2502.00299)" in done.stdout, done.stderr


def test_the_conformance_matrix_holds_for_it(site: Path) -> None:
    """All of it but the kept sets written out by hand, which are those of our own policies."""
    chosen = ["tests/kvcache/test_conformance.py", "-k", "wholechunks and not by_hand"]
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 80


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_scores_are_the_chunks_mean_votes(module: ModuleType, chunk: int) -> None:
    cache = PagedCache(107, num_heads=4, num_kv_heads=2, num_layers=1, seed=3)
    policy = module.WholeChunks(module.WholeChunks.Args(window=6, chunk=chunk))
    evidence = LayerEvidence(0, cache.keys[0], cache.values[0], cache.queries[0, 101:107], SCALE)
    scores = policy.scores(evidence)
    assert scores[:, 101:].isinf().all()
    queries, keys = cache.queries[0, 101:107].transpose(0, 1).tolist(), cache.keys[0].tolist()
    plain: dict[str, Any] = {
        "kernel": 1,
        "pooling": "none",
        "group_reduce": "max",
        "group_stage": "probabilities",
        "window_reduce": "mean",
    }
    for head in range(2):
        votes = torch.tensor(snapkv_votes(queries[2 * head : 2 * head + 2], keys[head], SCALE, **plain))
        for first in range(0, 101, chunk):
            own = scores[head, first : min(first + chunk, 101)]
            assert own.tolist() == pytest.approx([float(votes[first : first + chunk].mean())] * len(own), rel=1e-4)
