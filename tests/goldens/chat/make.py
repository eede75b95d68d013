"""chats.json: what transformers' apply_chat_template makes of chats with the templates here.

    pip install transformers tokenizers && python make.py [SmolLM2-135M-Instruct.Q4_1.gguf]
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHATS = [
    chat(("user", "What is the capital of France?")),
    chat(("system", "  You are a pirate.\n"), ("user", "Hi"), ("assistant", "Arr!"), ("user", " Bye \n")),
    chat(("user", "a <b> & 'c' \"d\" {{ e }} {% f %} é日👍\\n\t"), ("assistant", "<think>\nhm\n\n</think>\n\nyes"), ("user", "")),
    chat(("user", "1"), ("assistant", "<think>x</think>2"), ("user", "<tool>3</tool>"), ("assistant", "no thought")),
    chat(("user", "one"), ("user", "two")),
    chat(("system", "only")),
    chat(("assistant", "first")),
    [],
]

kinds = {path.stem: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>",
                                            chat_template=path.read_text()) for path in sorted(HERE.glob("*.jinja"))}
if len(sys.argv) > 1:
    gguf = Path(sys.argv[1])
    kinds["smollm2"] = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
cases = []
for name, tokenizer in kinds.items():
    for messages in CHATS:
        for prompt in (False, True):
            case = {"template": name, "messages": messages, "prompt": prompt}
            try:
                case["text"] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
(HERE / "chats.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
print(len(cases), "cases,", sum("error" in case for case in cases), "of them errors")
print({case["error"] for case in cases if "error" in case})
