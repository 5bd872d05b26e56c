"""The quality table of docs/results.md by one command: a server, 32 passkey documents, every policy.

`python -m benchmarks.quality.full [--out DIR]` or `make quality`. On two cores: about 17 minutes, most of them the
dense prefill of 32 x 6,000 tokens; later policies find those prompts in the prefix cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.quality.run import main as run
from benchmarks.serving import running_server

POLICIES = [
    "none", "snapkv:512", "pyramidkv:512", "streamingllm:512", "random:512", "l2norm:512",
    "zigzagkv:512", "adakv:512", "criticalkv:512", "tova:512", "keydiff:512",
    "snapkv:256", "pyramidkv:256", "zigzagkv:256", "adakv:256", "l2norm:2048",
]  # fmt: skip
EXPECTATIONS = [
    "none>=31", "snapkv:512>=30", "pyramidkv:512>=30", "streamingllm:512==window", "random:512<snapkv:512",
]  # fmt: skip
# 32 prompts of 6,000 tokens at 22.5 KiB a token have to stay in the prefix cache for the later policies.
KV_CACHE = "5G"


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when every expectation holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results-local/quality"))
    parser.add_argument("--tokens", default="6000")
    parser.add_argument("--documents", default="32")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with running_server(args.out / "server.log", "--kv-cache-memory-bytes", KV_CACHE) as server:
        return run(
            ["--base-url", f"{server.url}/v1", "--tokens", args.tokens, "--documents", args.documents,
             "--out", str(args.out), "--policies", *POLICIES, "--expect", *EXPECTATIONS]
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
