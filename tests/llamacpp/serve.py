"""Answer questions about one GGUF file by stock llama.cpp: a program of its own, since a failed assertion ends it.

Run as ``python serve.py FILE < questions.json``; the answers are the last line on stdout. It needs nothing of lpsearch.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def start(path: str, *, num_tokens: int) -> xllamacpp.Server:
    """Serve a file on one thread, with a cache in float32, so that float32 weights give float32 logits."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = num_tokens, 1, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def ask(address: str, path: str, question: dict[str, Any]) -> Any:
    """Post a question to the server."""
    request = urllib.request.Request(
        address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def score(address: str, prompt: list[int], *, vocab_size: int, letter: int) -> dict[str, float]:
    """Return the log-probability of every token after a prompt of token ids, before any sampler.

    The server gives them with the token that it samples. It holds back one whose bytes are no whole character, so a
    letter is made the choice.
    """
    question = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": vocab_size,
        "logit_bias": [[letter, 1e5]],
        "temperature": 0,
    }
    answer = ask(address, "/completion", question | {"cache_prompt": False, "logit_bias": [[letter, 1e5]]})
    entries = answer["completion_probabilities"][0]["top_logprobs"]
    return {str(entry["id"]): entry["logprob"] for entry in entries}


def complete(address: str, prompt: list[int], *, num_tokens: int) -> list[int]:
    """Continue a prompt of token ids greedily."""
    question = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "return_tokens": True}
    return list(ask(address, "/completion", question | {"ignore_eos": True, "cache_prompt": False})["tokens"])


def main() -> None:
    """Read the questions, print the answers."""
    questions = json.load(sys.stdin)
    server = start(sys.argv[1], num_tokens=questions.get("context", 128))
    address = server.listening_address
    letter = ask(address, "/tokenize", {"content": "a"})["tokens"][-1]
    answers = {
        "log_probabilities": [
            score(address, prompt, vocab_size=questions["vocab_size"], letter=letter)
            for prompt in questions.get("prompts", [])
        ],
        "continuations": [
            complete(address, prompt, num_tokens=questions["num_tokens"]) for prompt in questions.get("continue", [])
        ],
        "token_ids": [
            ask(address, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            for text in questions.get("texts", [])
        ],
        "chats": [
            ask(address, "/apply-template", {"messages": messages})["prompt"] for messages in questions.get("chats", [])
        ],
    }
    sys.stderr.flush()
    print("\n" + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
