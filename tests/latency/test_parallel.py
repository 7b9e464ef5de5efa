"""Tensor parallelism: any number of ranks computes what one does; failures end all ranks and say why."""

from __future__ import annotations

import pytest
import torch

from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.latency.ranks.parallel import ProcessGroupRanks
from lpsearch.latency.ranks.processes import run_ranks
from lpsearch.latency.ranks.symmetric import SymmetricRanks
from lpsearch.latency.runtime.decoder import build_decoder
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from tests.latency.failing_ranks import die_on_second_rank, fail_on_second_rank
from tests.tiny_models import RUNTIME_FAMILIES, build_tiny_model
from tests.tolerances import BFLOAT16_LOGITS, FLOAT32_LOGITS

PLAN = Plan.from_groups([[0, 1, 2], [3], [4, 5]])
PLANS = (Plan.baseline(6), PLAN, PLAN.drop({"attention": [1, 3], "mlp": [0, 4, 5]}))
NUM_STEPS = 8
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
}


def build_model(family):
    return build_tiny_model(family, **WIDE, **OPTIONS.get(family, {}))


def decode(model, plan, ranks=None, mode=None):
    """Return the logits of a prompt and some greedy steps, (batch, steps, vocab), and the tokens."""
    prompt = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
    decoder = build_decoder(model, plan, batch_size=2, capacity=24, ranks=ranks, mode=mode)
    logits, tokens = [decoder.prefill(prompt)], [decoder.tokens.clone()]
    for _ in range(NUM_STEPS):
        logits.append(decoder.decode_logits())
        tokens.append(decoder.tokens.clone())
    return torch.stack(logits, dim=1).cpu(), torch.cat(tokens, dim=1).cpu()


def to_arrays(tensors):
    return [tensor.float().numpy() for tensor in tensors]


def decode_families(group, families):
    ranks = ProcessGroupRanks(group)
    cases = [(family, plan) for family in families for plan in PLANS]
    return [to_arrays(decode(build_model(family), plan, ranks)) for family, plan in cases]


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "families"), [(2, RUNTIME_FAMILIES), (4, ("llama", "gemma3_text", "olmo2"))])
def test_ranks_together_are_one_rank(num_ranks, families):
    found = run_ranks(decode_families, num_ranks=num_ranks, backend="gloo", arguments=[families])
    cases = [(family, plan) for family in families for plan in PLANS]
    for (family, plan), arrays in zip(cases, found, strict=True):
        logits, tokens = map(torch.from_numpy, arrays)
        expected, expected_tokens = decode(build_model(family), plan)
        assert torch.equal(tokens.long(), expected_tokens), family
        torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_LOGITS)


def sum_transposed(group, kind):
    ranks = ProcessGroupRanks(group) if kind in ("gloo", "nccl") else SymmetricRanks(group, kind)
    partial = torch.arange(128.0).view(8, 16).T + 128 * ranks.rank
    ranks.begin_step()
    return ranks.all_reduce(partial if kind == "gloo" else partial.to("cuda", torch.bfloat16)).float().cpu().numpy()


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize(
    "kind", ["gloo", *(pytest.param(kind, marks=pytest.mark.multi_gpu) for kind in ("nccl", "one_shot", "push"))]
)
def test_ranks_add_up_what_is_not_contiguous(kind):
    backend = "gloo" if kind == "gloo" else "nccl"
    summed = torch.from_numpy(run_ranks(sum_transposed, num_ranks=2, backend=backend, arguments=[kind]))
    # Sums of up to 382 are exact in bfloat16 where they are even.
    assert torch.equal(summed, 2 * torch.arange(128.0).view(8, 16).T + 128)


def test_heads_that_cannot_be_divided_are_refused_by_name():
    traits = read_traits(build_tiny_model("llama").config)
    traits.check_ranks(2)
    with pytest.raises(ConfigError, match="llama: 2 key-value heads cannot be divided over 4 ranks; choose one of 1"):
        traits.check_ranks(4)
    with pytest.raises(ConfigError, match="4 attention heads and 2 key-value heads cannot"):
        traits.check_ranks(3)


@pytest.mark.usefixtures("warm_starts")
def test_a_failing_rank_ends_all_with_its_message():
    with pytest.raises(LpsearchError, match=r"rank 1 of 2 failed: ValueError: out of cheese \(.*failing_ranks.py"):
        run_ranks(fail_on_second_rank, num_ranks=2, backend="gloo", arguments=[ValueError("out of cheese")])
    with pytest.raises(ConfigError, match="no such thing"):
        run_ranks(fail_on_second_rank, num_ranks=2, backend="gloo", arguments=[ConfigError("no such thing")])
    with pytest.raises(LpsearchError, match="rank 1 of 2 failed: ended without a message, exit code 7"):
        run_ranks(die_on_second_rank, num_ranks=2, backend="gloo")


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ConfigError, match="1000 ranks need 1000 GPUs"):
        run_ranks(die_on_second_rank, num_ranks=1000, backend="nccl")


def decode_on_gpus(group, families, kind):
    ranks = ProcessGroupRanks(group) if kind == "nccl" else SymmetricRanks(group, kind)
    models = [build_model(family).to("cuda", torch.bfloat16) for family in families]
    return [to_arrays(decode(model, plan, ranks, "compiled")) for model in models for plan in PLANS]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", ["nccl", "one_shot", "push"])
def test_gpus_together_are_one_gpu(kind):
    families = ["llama", "gemma3_text", "olmo2"]
    found = run_ranks(decode_on_gpus, num_ranks=2, backend="nccl", arguments=[families, kind])
    cases = [(family, plan) for family in families for plan in PLANS]
    for (family, plan), arrays in zip(cases, found, strict=True):
        logits, tokens = map(torch.from_numpy, arrays)
        expected, expected_tokens = decode(build_model(family), plan)
        # Rounding may choose another token, after which the continuations differ.
        same = int((tokens == expected_tokens).all(0).long().cumprod(0).sum())
        assert same > 0, family
        error = (logits[:, : same + 1].float() - expected[:, : same + 1]).norm() / expected[:, : same + 1].norm()
        assert error < BFLOAT16_LOGITS, family
