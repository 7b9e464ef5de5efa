"""A small decoder that runs a plan as it would be served: groups fused into wide layers, static cache, captured steps.

It is built from shapes with random weights, to measure a plan without a download, or from a Hugging Face model, to show
that what is measured is the model. The unmodified model is the plan whose every layer is alone; it gets the same fused
projections, kernels and graph as any other plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lpsearch.errors import ConfigError
from lpsearch.latency.runtime.attention import GroupAttention
from lpsearch.latency.runtime.graphs import capture_graph
from lpsearch.latency.runtime.launch import has_kernels
from lpsearch.latency.runtime.operations import Operations
from lpsearch.latency.runtime.weights import DecoderWeights, fuse_model
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.timing import measure_interleaved
from lpsearch.models.traits import FamilyTraits, read_traits
from lpsearch.transform.fused_weights import WideLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from lpsearch.latency.runtime.memory import Workspace
    from lpsearch.plan import Plan

__all__ = ["Decoder", "RunMode", "build_decoder", "default_mode"]

RunMode = Literal["eager", "graph", "compiled"]
"""How a step runs: operation by operation; the same captured in a CUDA graph; fused and captured."""

_CHOICE_S = 0.1
_CHOICE_BLOCKS = 5


def default_mode(device: torch.device) -> RunMode:
    """Return the fastest mode of a device: ``compiled`` on CUDA, else ``eager``."""
    return "compiled" if has_kernels(device) else "eager"


class Decoder:
    """A decoder under a plan, with the cache of ``batch_size`` sequences of equal length.

    ``prefill`` reads a prompt, then each ``step`` appends one greedy token a sequence. With several ranks every rank
    makes the same calls.

    Args:
        traits: shape and arithmetic of the model.
        weights: this rank's weights.
        batch_size: sequences.
        capacity: tokens that the cache holds.
        mode: how steps run; anything but ``eager`` needs a CUDA device.
        ranks: the ranks that share the model; None for one.
        cache_workspace: where to take the cache from; None allocates it.
        pool: memory pool of the graphs; None takes one of its own.

    Attributes:
        mode: how steps run.
        tokens: (batch, 1), the last token of each sequence.
        fused_attention: whether steps attend by this package's kernel, in ``compiled`` mode alone.

    Raises:
        ConfigError: for a mode that the device has not.
    """

    def __init__(
        self,
        traits: FamilyTraits,
        weights: DecoderWeights,
        *,
        batch_size: int,
        capacity: int,
        mode: RunMode,
        ranks: Ranks | None = None,
        cache_workspace: Workspace | None = None,
        pool: Any = None,
    ) -> None:
        device = weights.embedding.device
        if mode != "eager" and device.type != "cuda":
            raise ConfigError(f"mode {mode} needs a CUDA device, and the model is on {device}; use eager")
        self.mode: RunMode = mode
        self.tokens = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
        self._traits = traits
        self._weights = weights
        self._ranks = ranks or OneRank()
        self._ops = Operations(fused=mode == "compiled", eps=traits.norm_eps, activation=traits.activation)
        self._capacity = capacity
        self._length = 0
        self._position = torch.zeros((), dtype=torch.int32, device=device)
        self._pool = pool
        self.fused_attention = mode == "compiled"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_length = -1
        self._attention = GroupAttention(traits, self._ranks, num_positions=capacity, device=device)
        kv_heads = traits.num_kv_heads // self._ranks.num_ranks
        self._caches: list[list[Tensor]] = []
        for layer in weights.layers:
            shapes = [(2, batch_size, len(part.layers) * kv_heads, capacity, traits.head_dim) for part in layer.parts]
            self._caches.append(
                [
                    cache_workspace.take(shape)
                    if cache_workspace is not None
                    else torch.zeros(shape, dtype=weights.embedding.dtype, device=device)
                    for shape in shapes
                ]
            )

    @property
    def length(self) -> int:
        """Tokens cached of each sequence."""
        return self._length

    def set_length(self, length: int) -> None:
        """Pretend that so many tokens are cached; the entries keep what they hold."""
        if not 0 <= length < self._capacity:
            raise ConfigError(f"a cache of {self._capacity} tokens cannot hold {length} and one more")
        self._length = length
        self._position.fill_(length)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read prompts into an empty cache and set the next greedy tokens.

        Args:
            tokens: (batch, seq).

        Returns:
            Logits of the last position, (batch, vocab_size).
        """
        self.set_length(0)
        logits = self._forward(tokens)
        self._choose(logits)
        self.set_length(tokens.shape[1])
        return self._gather_logits(logits)

    @torch.inference_mode()
    def decode_logits(self) -> Tensor:
        """Run one step from the tokens at hand without a graph and return the logits, (batch, vocab_size)."""
        logits = self._forward(self.tokens)
        self._choose(logits)
        self._advance()
        return self._gather_logits(logits)

    def step(self) -> None:
        """Decode one token a sequence, embedding to argmax, from ``tokens`` to ``tokens``."""
        self.run_step()
        self._advance()

    def run_step(self) -> None:
        """Decode one token a sequence but leave the length as it is: what TPOT is the time of."""
        if self.mode == "eager":
            self._decode()
            return
        # Fused attention reads the position on the device; plain attention slices the cache at one length.
        if self._graph is None or (not self.fused_attention and self._graph_length != self._length):
            self.capture()
        assert self._graph is not None
        self._graph.replay()

    def capture(self) -> None:
        """Capture the step as a CUDA graph; the cache entry at the current length is overwritten."""
        tokens = self.tokens.clone()
        self._graph, self._graph_length = capture_graph(self._decode, self._pool), self._length
        self.tokens.copy_(tokens)

    def capture_fastest(self) -> None:
        """Capture the step with the attention that is faster at this length, on the slowest rank.

        For steps that are repeated at one length: the plain attention of the library is the faster one for many
        sequences, but has to be captured again for each length.
        """
        if self.mode != "compiled":
            self.capture()
            return
        tokens = self.tokens.clone()
        graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        for fused in (True, False):
            self.fused_attention = fused
            self.capture()
            assert self._graph is not None
            graphs[fused] = self._graph
        by_kernel, plain = measure_interleaved(
            [graphs[True].replay, graphs[False].replay],
            device=self.tokens.device,
            ranks=self._ranks,
            budget_s=_CHOICE_S,
            min_blocks=_CHOICE_BLOCKS,
            warm_up_s=_CHOICE_S,
        )
        self.fused_attention = by_kernel.median_ms <= plain.median_ms
        self._graph = graphs[self.fused_attention]
        self.tokens.copy_(tokens)

    def capture_prefill(self, tokens: Tensor) -> Callable[[], object]:
        """Return a function that reads these prompts and sets the next tokens: what TTFT is the time of.

        Args:
            tokens: (batch, seq).
        """

        @torch.inference_mode()
        def run() -> None:
            self._length = 0
            self._choose(self._forward(tokens))

        if self.mode == "eager":
            return run
        graph = capture_graph(run, self._pool)

        def replay(held: tuple[Decoder, Tensor] = (self, tokens)) -> None:  # a graph does not keep its memory alive
            graph.replay()

        return replay

    def count_step_bytes(self) -> int:
        """Return the bytes that a step must read on this rank: weights and valid cache entries, each once."""
        matrices = [matrix for layer in self._weights.layers for matrix in layer.list_matrices()]
        num_bytes = sum(matrix.numel() * matrix.element_size() for matrix in [*matrices, self._weights.head])
        for layer, caches in zip(self._weights.layers, self._caches, strict=True):
            for part, cache in zip(layer.parts, caches, strict=True):
                held = min(self._length + 1, part.kind.window or self._capacity)
                num_bytes += cache.numel() // self._capacity * held * cache.element_size()
        return num_bytes

    @torch.inference_mode()
    def _decode(self) -> None:
        self._choose(self._forward(self.tokens))

    def _advance(self) -> None:
        self._length += 1
        self._position += 1

    def _forward(self, tokens: Tensor) -> Tensor:
        """Return this rank's logits of the last position, (batch, rows), from (batch, seq) tokens after the cached."""
        traits = self._traits
        self._ranks.begin_step()
        batch, seq = tokens.shape
        hidden = torch.nn.functional.embedding(tokens.reshape(-1), self._weights.embedding)  # (batch * seq, hidden)
        if traits.embedding_scale != 1:
            # Rounded as the families do, which hold the factor in the dtype of the weights.
            hidden = hidden * torch.tensor(traits.embedding_scale, dtype=hidden.dtype).item()
        for layer, caches in zip(self._weights.layers, self._caches, strict=True):
            hidden = self._run_layer(layer, caches, hidden, batch)
        last = hidden.view(batch, seq, -1)[:, -1]
        logits = self._ops.project(last, self._weights.head, None, norm=True)
        if traits.logits_scale != 1:
            logits = logits * traits.logits_scale
        if traits.logits_softcap is not None:
            logits = traits.logits_softcap * torch.tanh(logits / traits.logits_softcap)
        return logits

    def _run_layer(self, layer: WideLayer, caches: list[Tensor], hidden: Tensor, batch: int) -> Tensor:
        """Run a group: one attention and one MLP, each with one sum over ranks; (rows, hidden) to the same.

        A stage of which the plan drops every member is not there: no kernel, no cache and no sum.
        """
        pre_norm = self._traits.has_pre_norms
        if layer.qkv is not None and layer.o is not None:
            qkv = self._ops.project(hidden, layer.qkv, layer.qkv_bias, norm=pre_norm)
            position = self._position if self.fused_attention and len(qkv) == batch else None
            attended = self._attention.attend(layer, caches, qkv, length=self._length, position=position)
            hidden = self._finish(attended, layer.o, layer.o_bias, layer.attention_post, hidden)
        if layer.gate_up is not None and layer.down is not None:
            inner = self._ops.gate(hidden, layer.gate_up, layer.gate_up_bias, norm=pre_norm)
            hidden = self._finish(inner, layer.down, layer.down_bias, layer.mlp_post, hidden)
        return hidden

    def _finish(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, post: Tensor | None, residual: Tensor
    ) -> Tensor:
        """Multiply by an output projection, add up over ranks, and add to the residual stream."""
        if post is None:
            # The first rank alone adds the residual, so that the sum over ranks holds it once.
            own = residual if self._ranks.rank == 0 else None
            return self._ranks.all_reduce(self._ops.output(rows, weight, bias, own)[0])
        outputs = self._ranks.all_reduce(self._ops.output(rows, weight, bias, None))
        return self._ops.add_normed(residual, outputs, post)

    def _choose(self, logits: Tensor) -> None:
        """Set the tokens of the largest logits, of all ranks' parts of the vocabulary."""
        best, index = logits.max(dim=-1)
        if self._ranks.num_ranks > 1:
            # As float32 a token is exact up to 2^24. Ranks hold ascending parts: the first of equals is the smallest.
            found = torch.stack([best.float(), (index + self._weights.head_start).float()], dim=-1)  # (batch, 2)
            gathered = self._ranks.all_gather(found)  # (ranks, batch, 2)
            winner = gathered[..., 0].argmax(dim=0)
            index = gathered[..., 1].gather(0, winner[None])[0].long()
        self.tokens.copy_(index[:, None])

    def _gather_logits(self, logits: Tensor) -> Tensor:
        if self._ranks.num_ranks == 1:
            return logits
        rows = -(-self._traits.vocab_size // self._ranks.num_ranks)
        padded = torch.nn.functional.pad(logits, (0, rows - logits.shape[1]))
        return self._ranks.all_gather(padded).transpose(0, 1).flatten(1)[:, : self._traits.vocab_size]


def build_decoder(
    model: PreTrainedModel,
    plan: Plan,
    *,
    batch_size: int,
    capacity: int,
    mode: RunMode | None = None,
    ranks: Ranks | None = None,
) -> Decoder:
    """Build the decoder of a Hugging Face model under a plan, with its real weights.

    Args:
        model: the unmodified model, on the device and in the dtype to run in.
        plan: its groups.
        batch_size: sequences.
        capacity: tokens that the cache holds.
        mode: how steps run; None takes the fastest.
        ranks: the ranks that share the model, each of which was given the whole of it; None for one.

    Raises:
        FamilyError: for a family that the runtime does not compute.
        ConfigError: if the ranks do not divide the heads.
    """
    traits = read_traits(model.config)
    traits.check_runtime()
    ranks = ranks or OneRank()
    traits.check_ranks(ranks.num_ranks)
    weights = fuse_model(model, traits, plan, rank=ranks.rank, num_ranks=ranks.num_ranks)
    return Decoder(
        traits,
        weights,
        batch_size=batch_size,
        capacity=capacity,
        mode=mode or default_mode(model.device),
        ranks=ranks,
    )
