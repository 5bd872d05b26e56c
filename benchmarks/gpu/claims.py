"""All speed measurements of one configuration in one engine, since a start takes longer than most of them.

python -m benchmarks.gpu.claims stock|longreach [--fp8] [--requests N] [--no-latency] [--same]
"""

from __future__ import annotations

import argparse

from benchmarks.gpu import capacity, latency, prefix
from benchmarks.gpu.engine import build_8b, say

LATENCY = [(8192, 1), (8192, 8), (32768, 1), (32768, 8), (126000, 1), (126000, 3)]
SNAPKV = {"policy": "snapkv", "budget": capacity.BUDGET}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("stock", "longreach"))
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    parser.add_argument("--requests", type=int, default=128, help="compressed requests of 32k that decode at once")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--same", action="store_true", help="all of them have one prompt (quick; decoding is the same)")
    args = parser.parse_args()
    stock = args.system == "stock"
    llm = build_8b(stock=stock, fp8=args.fp8)
    say(system=args.system, fp8=args.fp8)
    if not args.no_latency:
        for prompt, batch in LATENCY:
            latency.report(llm, prompt, batch)
    prefix.measure(llm, None, 1)
    if stock:
        capacity.measure(llm, 2048, 128, None, same=False)
        capacity.measure(llm, 32768, None, None, same=False)
    else:
        prefix.measure(llm, SNAPKV, 1_000_000)
        capacity.measure(llm, 32768, args.requests, SNAPKV, same=args.same)


if __name__ == "__main__":
    main()
