"""Serve directories by vLLM in this process, one after the other, and write down what each says.

    python -m tests.vllm.serve REQUEST.json RESULT.json

vLLM keeps much state for each process and starts workers, so that the tests run this in a process of its own.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main(request_file: Path, result_file: Path) -> None:
    """Read a request, write one result a directory: what was served, or the traceback."""
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(request_file.read_text(encoding="utf-8"))
    results = {}
    for name in request["names"]:
        try:
            results[name] = _serve(Path(request["root"]), name, request)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        result_file.write_text(json.dumps(results), encoding="utf-8")


def _serve(root: Path, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Serve one directory: tokens, log probabilities of the first one, and what vLLM made of the directory."""
    from vllm import LLM, SamplingParams

    expected = json.loads((root / f"{name}.json").read_text(encoding="utf-8"))
    llm = LLM(
        str(root / name),
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=request["trust_remote_code"],
        tensor_parallel_size=request["num_ranks"],
        skip_tokenizer_init=True,
        max_model_len=128,
        max_logprobs=-1,
        seed=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in expected["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=len(expected["greedy"][0]), ignore_eos=True, detokenize=False)
    # In a call of their own: of every token of the vocabulary, for the first new token alone.
    first = SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprobs=-1)
    rows = [output.outputs[0].logprobs[0] for output in llm.generate(prompts, first, use_tqdm=False)]
    return {
        "greedy": [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)],
        "log_probs": [[row[token].logprob for token in range(len(row))] for row in rows],
        "served": llm.collective_rpc(_describe),
    }


def _describe(worker: Any) -> dict[str, Any]:
    """Say, in a worker, which model runs there and the key-value heads that its cache was made for."""
    from vllm.model_executor.layers.attention import Attention

    model = worker.get_model()
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return {
        "module": type(model).__module__,
        "name": type(model).__name__,
        "num_kv_heads": [layer.num_kv_heads for layer in layers],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
