"""What the dashboard shows: rows of panels, each with its queries, what it tells and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

PERCENTILES = (50, 95, 99)
OF = '{instance=~"$instance"}'
"""The servers that are chosen at the top of the dashboard."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        queries: legend (Grafana's template) and PromQL expression of each.
        tells: what it shows, and what to do when it looks bad.
        unit: Grafana's name of a unit.
        stat: one number, not a curve.
        stacked: curves that add up to a whole.
        full: the largest value there can be.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    tells: str
    unit: str = "short"
    stat: bool = False
    stacked: bool = False
    full: float | None = None


def rate(metric: str, *labels: str, matching: str = "") -> str:
    """Events a second, added up over servers, by these labels."""
    by = f" by ({', '.join(labels)})" if labels else ""
    selector = OF if not matching else OF.replace("}", f", {matching}}}")
    return f"sum{by} (rate({metric}{selector}[$__rate_interval]))"


def percentiles(histogram: str) -> tuple[tuple[str, str], ...]:
    """Of all requests of the chosen servers."""
    buckets = rate(f"{histogram}_bucket", "le")
    return tuple((f"p{p}", f"histogram_quantile({p / 100}, {buckets})") for p in PERCENTILES)


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def mean(total: str, number: str, by: str) -> str:
    """Of what happened; a line by a label that nothing happened to is left out."""
    return share(rate(total, by), f"({rate(number, by)} > 0)")


TOKENS = rate("vllm:generation_tokens_total")
BLOCKS = f"longreach_kv_blocks{OF}"
STEPS = rate("longreach_decode_steps_total", "selector")
CROWDED = rate("longreach_decode_steps_total", "selector", matching='mode="crowded"')
USED = OF.replace("}", ', state!="free"}')

ROWS: dict[str, tuple[Panel, ...]] = {
    "At a glance": (
        Panel(
            "Servers up",
            (("", 'sum(up{job="longreach", instance=~"$instance"})'),),
            "Servers that answer Prometheus. Fewer than you run: see the alert LongreachDown.",
            stat=True,
        ),
        Panel(
            "Requests running",
            (("", f"sum(vllm:num_requests_running{OF})"),),
            "Requests in the engines' batches. Flat at `--max-num-seqs` a server while others wait: raise that flag.",
            stat=True,
        ),
        Panel(
            "Requests waiting",
            (("", f"sum(vllm:num_requests_waiting{OF})"),),
            "Requests that no engine has room for yet. The autoscaler follows this number.",
            stat=True,
        ),
        Panel(
            "KV cache held",
            (("", f"sum(longreach_kv_blocks{USED}) / sum({BLOCKS})"),),
            "Share of the KV cache that requests hold, prefix cache left out.",
            "percentunit",
            stat=True,
            full=1,
        ),
        Panel(
            "Generated tokens a second",
            (("", TOKENS),),
            "What clients get, all requests together.",
            stat=True,
        ),
        Panel(
            "Errors a second",
            (("", rate("longreach_request_errors_total")),),
            "Requests answered with an error, whosever fault. The row Errors says which.",
            "reqps",
            stat=True,
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            percentiles("vllm:time_to_first_token_seconds"),
            "From a request's arrival to its first token: waiting and prefill. High with requests waiting: more "
            "servers, or "
            "smaller budgets, so that more fit. High without: prompts are long; a pattern computes less of them "
            "(`prefill_attention`), the prefix cache spares repeated ones.",
            "s",
        ),
        Panel(
            "Time per output token",
            percentiles("vllm:request_time_per_output_token_seconds"),
            "Mean over each request's answer. Grows with the tokens that each step reads: policies and "
            "selectors make it "
            "small for long contexts; and with the batch: `--max-num-seqs` bounds it.",
            "s",
        ),
        Panel(
            "Time between tokens",
            percentiles("vllm:inter_token_latency_seconds"),
            "Of single tokens. p99 far above p50: steps with a prompt's chunk in them take long; a smaller "
            "`--max-num-batched-tokens` makes them shorter, and first tokens later.",
            "s",
        ),
        Panel(
            "Time in the queue",
            percentiles("vllm:request_queue_time_seconds"),
            "Part of the time to first token that was spent waiting for room.",
            "s",
        ),
        Panel(
            "Time of whole requests",
            percentiles("vllm:e2e_request_latency_seconds"),
            "From arrival to the last token. Time limits of proxies, and the drain time of a rolling update, "
            "have to be above it.",
            "s",
        ),
    ),
    "Load": (
        Panel(
            "Requests in the engine",
            (
                ("running", f"sum(vllm:num_requests_running{OF})"),
                ("waiting", f"sum(vllm:num_requests_waiting{OF})"),
            ),
            "Waiting that doesn't come back to zero: the load is above what the servers can do.",
            stacked=True,
        ),
        Panel(
            "Tokens a second",
            (
                ("prompts, computed", rate("vllm:prompt_tokens_by_source_total", matching='source="local_compute"')),
                ("prompts, from the prefix cache", rate("vllm:prompt_tokens_cached_total")),
                ("generated", TOKENS),
            ),
            "Throughput. Prompts from the prefix cache cost nearly nothing.",
        ),
        Panel(
            "Requests finished a second",
            (("{{finished_reason}}", rate("vllm:request_success_total", "finished_reason")),),
            "`abort`: clients went away, often at a time limit of theirs. `error`: see the servers' logs.",
            "reqps",
            stacked=True,
        ),
        Panel(
            "Prefix cache hits",
            (
                (
                    "of prompt tokens",
                    share(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")),
                ),
            ),
            "Share of prompts' tokens that needn't be computed. Lower than your traffic's shared prefixes with several "
            "servers: the router spreads what belongs together (policy `cache_aware` or `consistent_hash`).",
            "percentunit",
            full=1,
        ),
        Panel(
            "Preemptions a second",
            (("{{instance}}", rate("vllm:num_preemptions_total", "instance")),),
            "Requests thrown out of the KV cache for others' growth, and computed again. More than a few: "
            "smaller budgets, "
            "`interval` for long answers, a smaller `--max-num-seqs`, or more cache memory.",
        ),
        Panel(
            "Length of prompts",
            percentiles("vllm:request_prompt_tokens"),
            "Tokens. What sizing depends on most.",
        ),
    ),
    "KV cache": (
        Panel(
            "KV cache by who holds it",
            (("{{state}}", f"sum by (state) ({BLOCKS}) / on () group_left () sum({BLOCKS})"),),
            "Blocks of compacted requests, of all others (dense: policy `none`, prompts in progress), and free "
            "ones. Mostly "
            "dense where a policy is the default: prompts wait for their compaction, are within their budgets, "
            "or clients "
            "ask for `none`.",
            "percentunit",
            stacked=True,
            full=1,
        ),
        Panel(
            "Prompt tokens kept",
            (
                (
                    "{{policy}}",
                    mean("longreach_kv_tokens_kept_total", "longreach_kv_tokens_seen_total", "policy"),
                ),
            ),
            "Share of compacted requests' prompt tokens that stays, by policy. What is left of 1 is memory given back.",
            "percentunit",
            full=1,
        ),
        Panel(
            "Blocks given back a second",
            (("{{policy}}", rate("longreach_kv_blocks_freed_total", "policy")),),
            "KV cache freed by compaction, by policy.",
        ),
        Panel(
            "Compactions a second",
            (("{{policy}}", rate("longreach_kv_compactions_total", "policy")),),
            "Which policies are in use, and how much.",
        ),
        Panel(
            "Time of a compaction",
            (
                (
                    "{{policy}}",
                    mean("longreach_kv_compaction_seconds_total", "longreach_kv_compactions_total", "policy"),
                ),
            ),
            "Mean by policy; part of the time to the second token. Policies differ by a factor of a hundred "
            "(docs/results.md).",
            "s",
        ),
        Panel(
            "Share of time spent compacting",
            (("{{instance}}", rate("longreach_kv_compaction_seconds_total", "instance")),),
            "Of each server's time. All requests of a step wait while one is compacted. Above a tenth: a "
            "cheaper policy, or a "
            "longer `interval`.",
            "percentunit",
        ),
        Panel(
            "Scores that were not a number",
            (("all servers", f"sum(longreach_kv_nan_scores_total{OF}) or vector(0)"),),
            "Zero in a healthy server. Above: the model's numbers overflow (fp16, a broken checkpoint); their "
            "tokens are kept.",
        ),
    ),
    "Sparse attention": (
        Panel(
            "Density of prefill",
            (
                (
                    "{{pattern}}",
                    share(
                        rate("longreach_prefill_pairs_computed_total", "pattern"),
                        rate("longreach_prefill_pairs_total", "pattern"),
                    ),
                ),
            ),
            "Share of prompts' attention that was computed, by pattern. Near 1: prompts are too short for the "
            "pattern, or its "
            "threshold is too high to save time.",
            "percentunit",
            full=1,
        ),
        Panel(
            "Prompts with a pattern a second",
            (("{{pattern}}", rate("longreach_prefill_prompts_total", "pattern")),),
            "Which patterns are in use, and how much.",
        ),
        Panel(
            "Steps of selectors a second",
            (("{{selector}}: {{mode}}", rate("longreach_decode_steps_total", "selector", "mode")),),
            "What steps of decoding read: `dense` everything, `select` and `reuse` a part. Mostly dense: "
            "contexts are below "
            "the selector's `min_context`.",
            stacked=True,
        ),
        Panel(
            "Selectors without room",
            (
                (
                    "{{selector}}",
                    share(
                        f"({CROWDED} or 0 * {STEPS})",
                        STEPS,
                    ),
                ),
            ),
            "Share of steps that read everything because too many requests select at once. Raise "
            "`--decode-states`, or lower "
            "`--max-num-seqs`.",
            "percentunit",
            full=1,
        ),
    ),
    "Errors": (
        Panel(
            "Errors a second by kind",
            (("{{code}} {{field}}", rate("longreach_request_errors_total", "code", "field")),),
            "By HTTP status, and by the field of ours that was wrong. 400 with a field: a client asks for what "
            "this server "
            "doesn't allow; the answer told it what is. 401: keys. 429: limits. 5xx: ours, see the logs.",
            "reqps",
            stacked=True,
        ),
        Panel(
            "Share of requests with an error of the server's",
            (
                (
                    "5xx",
                    share(
                        rate("longreach_request_errors_total", matching='code=~"5.."'),
                        f"clamp_min({rate('http_requests_total')}, 1e-9)",
                    ),
                ),
            ),
            "Zero in a healthy server; the alert LongreachServerErrors fires above 1 %.",
            "percentunit",
        ),
        Panel(
            "Memory of the API process",
            (("{{instance}}", f"process_resident_memory_bytes{OF}"),),
            "Should be flat; steady growth is a leak worth a report.",
            "bytes",
        ),
    ),
}
