"""The chunked divergence against the plain one over whole logits, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpsearch.evaluation.head import OutputHead, run_decoder
from lpsearch.recovery.divergence import compute_divergence, sum_losses
from lpsearch.transform import apply_plan
from tests.recovery.distilling import PLAN
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT32_GRADIENTS, FLOAT32_LOSS
from tests.warm import run_warm


def _compute_plain(logits: Tensor, base_logits: Tensor) -> Tensor:
    """KL(base || plan), mean over positions, written out in float64."""
    log_probs, base_log_probs = logits.double().log_softmax(-1), base_logits.double().log_softmax(-1)
    return (base_log_probs.exp() * (base_log_probs - log_probs)).sum(-1).mean()


@pytest.mark.parametrize("chunk_bytes", [None, 7 * 4 * VOCAB_SIZE])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt_neox"])
def test_value_and_gradients_equal_the_plain_divergence(family: str, chunk_bytes: int | None) -> None:
    base, model = build_tiny_model(family), apply_plan(build_tiny_model(family), PLAN)
    model.requires_grad_(True)
    tokens = torch.randint(3, VOCAB_SIZE, (3, 10), generator=torch.Generator().manual_seed(0))
    expected = _compute_plain(model(input_ids=tokens).logits, base(input_ids=tokens).logits)
    layers = list(model.base_model.layers.parameters())
    expected_gradients = torch.autograd.grad(expected, layers)

    loss = compute_divergence(
        run_decoder(model, tokens),
        run_decoder(base, tokens),
        head=OutputHead(model, tokens),
        base_head=OutputHead(base, tokens),
        vocab_size=VOCAB_SIZE,
        chunk_bytes=chunk_bytes,
    )
    assert abs((loss - expected).item()) < FLOAT32_LOSS
    gradients = torch.autograd.grad(3 * loss, layers)
    largest = max(float(g.abs().max()) for g in expected_gradients)
    assert largest > 1e-4
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient / 3 - expected_gradient).abs().max() < FLOAT32_GRADIENTS * largest


def test_sums_equal_the_plain_losses() -> None:
    base, model = build_tiny_model("gemma2"), apply_plan(build_tiny_model("gemma2"), PLAN)
    tokens = torch.randint(3, VOCAB_SIZE, (3, 10), generator=torch.Generator().manual_seed(0))
    sums = sum_losses(
        run_decoder(model, tokens)[:, :-1],
        run_decoder(base, tokens)[:, :-1],
        tokens[:, 1:],
        head=OutputHead(model, tokens),
        base_head=OutputHead(base, tokens),
        vocab_size=VOCAB_SIZE,
        chunk_bytes=5 * 4 * VOCAB_SIZE,
    )
    logits = model(input_ids=tokens).logits[:, :-1]
    assert sums.num_tokens == 27
    expected_kl = _compute_plain(logits, base(input_ids=tokens).logits[:, :-1])
    expected_nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs((sums.kl / 27 - expected_kl).item()) < FLOAT32_LOSS
    assert abs((sums.nll / 27 - expected_nll).item()) < FLOAT32_LOSS


_MEASURED = """
import resource, sys, torch
from lpsearch.recovery.divergence import compute_divergence

vocab_size, hidden, positions = 262144, 32, int(sys.argv[1])
weight = torch.randn(vocab_size, hidden, generator=torch.Generator().manual_seed(0)) / hidden**0.5
head = lambda hidden_states: hidden_states @ weight.T
for count in (64, positions):  # the first warms up
    states = torch.randn(2, count // 2, hidden).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = compute_divergence(
        states, torch.randn(2, count // 2, hidden), head=head, base_head=head, vocab_size=vocab_size,
    )
    loss.backward()
    assert states.grad.abs().max() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_logits_of_a_large_vocabulary_never_exist_whole() -> None:
    """The peak above that of one chunk is far below the float32 logits of all positions, 512 MiB."""
    positions = 512
    run = run_warm(positions, code=_MEASURED)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 262144 * positions * 4 // 4
