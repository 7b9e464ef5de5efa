"""Every numerical tolerance that a test uses, with the reason for its size."""

from __future__ import annotations

FLOAT32_LOGITS = 2e-5
"""Largest absolute difference of float32 logits that differ by the order of a few additions."""

NLL_NATS_PER_TOKEN = 5e-5
"""Published baselines are given to four decimals of a nat."""

FLOAT32_LOSS = 2e-5
"""Largest absolute difference, in nats per token, of float32 losses of some nats from the same sum in float64."""

FLOAT32_GRADIENTS = 2e-5
"""Largest difference of float32 gradients that differ by the order of a few additions, relative to the largest one."""

BFLOAT16_LOGITS = 0.05
"""Relative difference (2-norm) of a tiny model's logits in bfloat16 from float32, six layers of rounding apart."""

VLLM_LOGITS = 1e-4
"""Relative difference (2-norm) of a row of float32 logits between vLLM and transformers: other products, another
attention. SmolLM2 with every layer in a group, where errors grow most, differs by 5e-5."""

FLOAT32_FUSED = 1e-5
"""Relative difference (2-norm) of float32 logits of a fused model from the unfused plan's: norms are folded in."""

FLOAT64_MEAN = 1e-12
"""Largest absolute difference, in nats per token, of float64 means of some losses that are added in another order."""

FLOAT64_COSTS = 1e-9
"""Largest absolute difference of float64 sums over the joins and products of a plan, added in another order."""

POSTERIOR_MEAN = 1e-6
"""Difference, mostly relative, of posterior means by Cholesky factors and by a dense inverse, or from what it saw."""

POSTERIOR_DEVIATION = 1e-5
"""The same of posterior standard deviations, which are roots of differences of near numbers."""

POSTERIOR_ORDER = 1e-9
"""Relative difference of posterior means whose observations come in another order."""

PREFIX_SAVINGS = 1e-9
"""Relative difference of the layers that prefixes are expected to save, added in another order."""

FLOAT64_INTERACTIONS = 1e-12
"""Largest absolute difference of float64 differences of a few losses, in nats per token, computed in another order."""

HYPERVOLUME = 1e-9
"""Largest absolute difference of a dominated area that is added corner by corner or in slices that fit its corners."""

HYPERVOLUME_OF_TIMES = 1e-4
"""The same where one side is times, whose slices fit the corners only nearly."""

PRINTED_DIGITS = 1e-4
"""Largest difference of a number from how it is printed, with four digits."""

MERGED_LOGITS = 1e-4
"""Difference of float32 logits of a model with an adapter and of one that it was merged into."""

STORED_FLOAT32 = 1e-6
"""Difference of float64 losses from how a table keeps them, as float32."""

BUNDLED_EPS = 1e-6
"""Relative difference of a norm's epsilon in a GGUF file, a float32, from the configuration's float64."""

LOSS_OF_BFLOAT16 = 0.02
"""Difference, in nats per token, of a small model's loss in float32 from that of its weights saved in bfloat16."""

TWICE = 0.02
"""Relative difference from 2 of a ratio of medians, drawn around 2 and 1 with a noise of 1 % and 0.5 %."""

LOSS_AGAIN = 1e-6
"""Difference, in nats per token, of a float32 loss that was evaluated again."""

FLOAT32_TRAINED = 2e-5
"""Largest difference of float32 weights after a dozen steps of AdamW at a learning rate of 3e-3, whose updates are of
the rate's size however small a gradient is: sums in another order move some of them."""

BFLOAT16_ROUNDING = 0.02
"""Largest difference of weights of order 1 in bfloat16 from float32 ones that were trained from the same start."""

FLOAT64_REGRESSION = 1e-8
"""Difference, mostly relative, of a float64 regression by normal equations from one by an orthogonal factorisation."""

FLOAT32_REFIT = 1e-3
"""Relative difference (2-norm) of a float32 model's refit from one in float64: what is solved is ill-conditioned."""

LLAMACPP_LOGITS = 1e-4
"""Largest absolute difference of float32 log-probabilities of tiny models by llama.cpp and by a loop in torch."""

DRAWN_MARGIN = 0.1
"""Relative difference of a standard error by a formula for many samples from that of 4,000 drawn ratios of medians of
30 samples."""
