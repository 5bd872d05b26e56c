"""A short soak of the server that all other tests talk to; the long ones are runs of `benchmarks.soak`."""

from __future__ import annotations

import pytest

from benchmarks.serving import Server
from benchmarks.soak.report import problems, summary
from benchmarks.soak.run import features_of, soak

pytestmark = pytest.mark.e2e


def test_everything_at_once_leaves_the_server_whole(server: Server) -> None:
    """Mixed requests, cut streams and aborts for 20 seconds: answers as asked for, canaries the same but for ties (the
    server's bfloat16 is not the same in any batch), an empty pool."""
    features = features_of(server, vocabulary=49152, longest=400, answer=40)
    assert features.patterns and "snapkv" in features.policies and "quest" in features.selectors
    result = soak(server, features, seconds=20, clients=4, seed=1, pause=2)
    bad = problems(result, memory=False, canaries=False)
    print(summary(result, bad))
    assert not bad
    assert result["server"]["audits"] > 50 and result["server"]["compactions"]
    assert result["answers"]["left"] and result["answers"]["400"] and sum(result["asked"].values()) > 10
    assert all(told["asked"] >= 2 for told in result["canaries"].values())
