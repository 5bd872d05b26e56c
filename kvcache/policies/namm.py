"""NAMM."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.observers.spectrogram import Spectrogram
from kvcache.policies.base import Policy, PolicyArgs


class NAMM(Policy):
    """An evolved network looks at the spectrogram of the attention that each token got, and at its age.

    Needs trained weights, which the server is given once (`--kv-namm-weights FILE`); without them requests are
    refused. The layout of published checkpoints is not verified. Decisions are made for each layer and KV head (the
    attention is the mean over its query heads), with the same network. Two differences from the paper: it keeps
    whatever scores above 0, here the highest scores fill the budget, which is fixed before the prompt runs; and it
    decides every 512 tokens, here once, at the prompt's end (the features are updated every 512). Slow: the prompt's
    attention is computed a second time, in time that grows with the square of its length, and the prefix cache saves
    such a request nothing. The paper always keeps the newest token (`recent: 1`) and forces no sinks.

    Formula:
        a_j = column j of the attention, mean over query heads, 512 queries at a time
        f_j <- 0.99 f_j + 0.01 |STFT(a_j)|, frame by frame (32 samples, hop 16, Hann)
        x_j = (f_j, embedding of the age n - 1 - j)
        score_j = w . (sum over i >= j of softmax_i(Q x_j . K x_i / sqrt(32)) V x_i) + b
    """

    name = "namm"
    title = "NAMM: a network over attention's history"
    paper = "arXiv 2410.13166"
    evidence = Evidence.SPECTROGRAMS

    class Args(PolicyArgs):
        recent: int = Field(32, ge=1, le=4096, description="Last tokens of the prompt that always stay.")

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        features, network = evidence.observed.get(Spectrogram.name), evidence.model.namm
        if features is None or network is None:
            raise ValueError("attention spectrograms and NAMM's weights are needed and are not there")
        return torch.stack([network.scores(head) for head in features])
