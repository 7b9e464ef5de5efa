"""How the groups of a plan lie in blocks of one attention stage and one MLP stage, either of which may be empty.

For engines that know blocks of differing sizes and no groups, e.g. llama.cpp's architecture ``deci``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpsearch.plan.groups import Plan

__all__ = ["Block", "arrange_blocks"]


@dataclass(frozen=True)
class Block:
    """One block: the layers whose attentions it sums, and those whose MLPs follow; either may be empty."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]


def arrange_blocks(plan: Plan) -> tuple[Block, ...]:
    """Lay the stages of a plan into as few blocks as hold them.

    A group is an attention stage, then an MLP stage, and either is missing where the plan drops all of it. A block
    takes an attention stage and the MLP stage that follows it, though it be that of the next group.
    """
    blocks: list[Block] = []
    open_attention: tuple[int, ...] = ()
    for group in plan.groups:
        if group.attention_layers:
            if open_attention:
                blocks.append(Block(open_attention, ()))
            open_attention = tuple(group.attention_layers)
        if group.mlp_layers:
            blocks.append(Block(open_attention, tuple(group.mlp_layers)))
            open_attention = ()
    if open_attention:
        blocks.append(Block(open_attention, ()))
    return tuple(blocks)
