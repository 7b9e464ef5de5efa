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
from lpsearch.latency.architecture import Architecture, AttentionKind, Segment, read_architecture
from lpsearch.latency.runtime import kernels
from lpsearch.latency.runtime.attention import Rope, attend, norm_heads
from lpsearch.latency.runtime.graphs import capture_graph
from lpsearch.latency.runtime.launch import has_kernels
from lpsearch.latency.runtime.operations import Operations
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.timing import measure_interleaved
from lpsearch.latency.weights import DecoderWeights, WideLayer, fuse_model

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
        architecture: shape and arithmetic.
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
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: DecoderWeights,
        *,
        batch_size: int,
        capacity: int,
        mode: RunMode,
        ranks: Ranks | None = None,
        cache_workspace: Workspace | None = None,
        pool: Any = None,
    ) -> None:
        """Take the cache and lay out the rotary tables."""
        device = weights.embedding.device
        if mode != "eager" and device.type != "cuda":
            raise ConfigError(f"mode {mode} needs a CUDA device, and the model is on {device}; use eager")
        self.mode: RunMode = mode
        self.tokens = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
        self._arch = architecture
        self._weights = weights
        self._ranks = ranks or OneRank()
        self._ops = Operations(fused=mode == "compiled", eps=architecture.norm_eps, activation=architecture.activation)
        self._capacity = capacity
        self._length = 0
        self._position = torch.zeros((), dtype=torch.int32, device=device)
        self._pool = pool
        self.fused_attention = mode == "compiled"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_length = -1
        self._ropes: dict[AttentionKind, Rope] = {
            kind: Rope(architecture, kind, num_positions=capacity, device=device)
            for kind in dict.fromkeys(architecture.kinds)
        }
        kv_heads = architecture.num_kv_heads // self._ranks.num_ranks
        self._caches: list[list[Tensor]] = []
        for layer in weights.layers:
            shapes = [
                (2, batch_size, len(segment.layers) * kv_heads, capacity, architecture.head_dim)
                for segment in layer.segments
            ]
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
            for segment, cache in zip(layer.segments, caches, strict=True):
                held = min(self._length + 1, segment.kind.window or self._capacity)
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
        arch = self._arch
        self._ranks.begin_step()
        batch, seq = tokens.shape
        hidden = torch.nn.functional.embedding(tokens.reshape(-1), self._weights.embedding)  # (batch * seq, hidden)
        if arch.embedding_scale != 1:
            # Rounded as the families do, which hold the factor in the dtype of the weights.
            hidden = hidden * torch.tensor(arch.embedding_scale, dtype=hidden.dtype).item()
        for layer, caches in zip(self._weights.layers, self._caches, strict=True):
            hidden = self._run_layer(layer, caches, hidden, batch)
        last = hidden.view(batch, seq, -1)[:, -1]
        logits = self._ops.project(last, self._weights.head, None, norm=True)
        if arch.logits_scale != 1:
            logits = logits * arch.logits_scale
        if arch.logits_softcap is not None:
            logits = arch.logits_softcap * torch.tanh(logits / arch.logits_softcap)
        return logits

    def _run_layer(self, layer: WideLayer, caches: list[Tensor], hidden: Tensor, batch: int) -> Tensor:
        """Run a group: one attention and one MLP, each with one sum over ranks; (rows, hidden) to the same."""
        pre_norm = self._arch.norm_form != "post"
        qkv = self._ops.project(hidden, layer.qkv, layer.qkv_bias, norm=pre_norm)
        attended = self._attend(layer, caches, qkv, batch)
        hidden = self._finish(attended, layer.o, layer.o_bias, layer.attention_post, hidden)
        inner = self._ops.gate(hidden, layer.gate_up, layer.gate_up_bias, norm=pre_norm)
        return self._finish(inner, layer.down, layer.down_bias, layer.mlp_post, hidden)

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

    def _attend(self, layer: WideLayer, caches: list[Tensor], qkv: Tensor, batch: int) -> Tensor:
        """Attend with every segment; (rows, projections) to (rows, heads * head_dim of all members)."""
        arch, ranks = self._arch, self._ranks.num_ranks
        heads, kv_heads = arch.num_heads // ranks, arch.num_kv_heads // ranks
        if arch.qk_norm == "full":
            qkv = self._norm_full_width(layer, qkv)
        fused = self.fused_attention and len(qkv) == batch
        out = qkv.new_empty((len(qkv), sum(len(s.layers) for s in layer.segments) * heads * arch.head_dim))
        row, column = 0, 0
        for index, (segment, cache) in enumerate(zip(layer.segments, caches, strict=True)):
            members = len(segment.layers)
            num_rows = members * (heads + 2 * kv_heads) * arch.head_dim
            num_columns = members * heads * arch.head_dim
            attend_segment = self._attend_fused if fused else self._attend_plain
            attend_segment(
                layer, index, segment, cache, qkv[:, row : row + num_rows], out[:, column : column + num_columns]
            )
            row, column = row + num_rows, column + num_columns
        return out

    def _attend_fused(
        self, layer: WideLayer, index: int, segment: Segment, cache: Tensor, qkv: Tensor, out: Tensor
    ) -> None:
        arch = self._arch
        rope = self._ropes[segment.kind]
        head_norms = arch.qk_norm == "head"
        kernels.attend_row(
            qkv,
            cache[0],
            cache[1],
            out,
            rope=rope.table,
            partner=rope.partner,
            position=self._position,
            q_norm=layer.q_norm[index] if head_norms else None,
            k_norm=layer.k_norm[index] if head_norms else None,
            norm_eps=arch.norm_eps,
            num_heads=out.shape[1] // arch.head_dim,
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
            window=segment.kind.window,
        )

    def _attend_plain(
        self, layer: WideLayer, index: int, segment: Segment, cache: Tensor, qkv: Tensor, out: Tensor
    ) -> None:
        arch, rope = self._arch, self._ropes[segment.kind]
        batch = cache.shape[1]
        heads, kv_heads = out.shape[1] // arch.head_dim, cache.shape[2]
        split = qkv.reshape(batch, len(qkv) // batch, -1, arch.head_dim)  # (batch, seq, all heads, head_dim)
        q, k, v = torch.split(split, [heads, kv_heads, kv_heads], dim=2)
        if arch.qk_norm == "head":
            q = norm_heads(q, layer.q_norm[index], arch.norm_eps)
            k = norm_heads(k, layer.k_norm[index], arch.norm_eps)
        attended = attend(
            rope.rotate(q, self._length),
            rope.rotate(k, self._length),
            v,
            cache[0],
            cache[1],
            start=self._length,
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
            window=segment.kind.window,
        )
        out.copy_(attended.flatten(2).flatten(0, 1))

    def _norm_full_width(self, layer: WideLayer, qkv: Tensor) -> Tensor:
        """Norm each member's queries and keys over their whole width, which is spread over ranks."""
        arch, ranks = self._arch, self._ranks.num_ranks
        widths = [heads // ranks * arch.head_dim for heads in (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)]
        counts = [len(segment.layers) * width for segment in layer.segments for width in widths]
        parts = list(torch.split(qkv, counts, dim=-1))
        picked = [(3 * index + part, part) for index in range(len(layer.segments)) for part in (0, 1)]
        split = {slot: parts[slot].float().reshape(len(qkv), -1, widths[part]) for slot, part in picked}
        squares = torch.cat([split[slot].square().sum(-1) for slot, _ in picked], dim=-1)  # (rows, 2 * members)
        squares = self._ranks.all_reduce(squares) / ranks
        counts = [split[slot].shape[1] for slot, _ in picked]
        for (slot, part), total in zip(picked, torch.split(squares, counts, dim=-1), strict=True):
            weight = (layer.q_norm, layer.k_norm)[part][slot // 3]
            factor = torch.rsqrt(total / widths[part] + arch.norm_eps)
            parts[slot] = (split[slot] * factor[..., None] * weight.float()).flatten(1).to(qkv.dtype)
        return torch.cat(parts, dim=-1)

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
        rows = -(-self._arch.vocab_size // self._ranks.num_ranks)
        padded = torch.nn.functional.pad(logits, (0, rows - logits.shape[1]))
        return self._ranks.all_gather(padded).transpose(0, 1).flatten(1)[:, : self._arch.vocab_size]


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
    architecture = read_architecture(model.config)
    ranks = ranks or OneRank()
    architecture.check_ranks(ranks.num_ranks)
    weights = fuse_model(model, architecture, plan, rank=ranks.rank, num_ranks=ranks.num_ranks)
    return Decoder(
        architecture,
        weights,
        batch_size=batch_size,
        capacity=capacity,
        mode=mode or default_mode(model.device),
        ranks=ranks,
    )
