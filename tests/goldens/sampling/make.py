"""warped.json: probabilities that transformers' logits processors leave, for the oracle of sampling.

    pip install torch transformers && python make.py
"""

import json
from pathlib import Path

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

torch.manual_seed(3)
cases = []
for penalty, temperature, top_k, top_p, min_p in [
    (1.0, 1.0, 0, 1.0, 0.0),
    (1.3, 1.0, 0, 1.0, 0.0),
    (0.7, 1.0, 0, 1.0, 0.0),
    (1.0, 0.6, 0, 1.0, 0.0),
    (1.0, 2.5, 5, 1.0, 0.0),
    (1.0, 1.0, 1, 1.0, 0.0),
    (1.0, 1.0, 99, 1.0, 0.0),
    (1.0, 1.0, 0, 0.8, 0.0),
    (1.0, 1.0, 0, 0.01, 0.0),
    (1.0, 1.0, 0, 1.0, 0.1),
    (1.2, 0.8, 20, 0.9, 0.05),
    (1.1, 1.7, 12, 0.7, 0.2),
]:
    logits = (4 * torch.randn(1, 40, dtype=torch.float64)).round(decimals=3)
    seen = torch.randint(0, 40, (1, 9))
    processors = LogitsProcessorList()
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        processors.append(MinPLogitsWarper(min_p))
    p = processors(seen, logits.clone()).softmax(-1)
    cases.append(
        {
            "repeat_penalty": penalty,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "logits": logits[0].tolist(),
            "seen": seen[0].tolist(),
            "probabilities": p[0].tolist(),
        }
    )
lines = ",\n".join(json.dumps(case) for case in cases)
(Path(__file__).parent / "warped.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
