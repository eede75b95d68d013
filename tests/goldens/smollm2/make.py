"""greedy.json: how transformers goes on, greedily in f32, with ten prompts by the real model.

    pip install torch transformers gguf && python make.py "$(scripts/fetch-smollm2)"
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 64
# Whether the prompt is a user's turn of a chat, and the prompt.
PROMPTS = [
    (True, "What is the capital of France?"),
    (True, "Name three colours."),
    (True, "Write a haiku about rain."),
    (True, "What is 2 + 2?"),
    (False, "Once upon a time"),
    (False, "The three laws of motion are"),
    (False, "def fibonacci(n):"),
    (False, "Water boils at"),
    (False, "La capitale de l'Italie est"),
    (False, "1, 2, 3, 5, 8,"),
]

path = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
texts = []
for chat, prompt in PROMPTS:
    text = prompt
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [logits[0].topk(2).values for logits in out.logits]
    texts.append(
        {
            "chat": chat,
            "prompt": prompt,
            "prompt_ids": ids[0].tolist(),
            "ids": out.sequences[0, ids.shape[1] :].tolist(),
            # Of each token: its logit, and how far the next best is below it.
            "logits": [round(float(two[0]), 4) for two in best],
            "margins": [round(float(two[0] - two[1]), 5) for two in best],
        }
    )
    print(prompt, "->", tokenizer.decode(texts[-1]["ids"]), flush=True)
lines = ",\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
(Path(__file__).parent / "greedy.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
