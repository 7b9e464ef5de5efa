"""Compare EvoPress's depth search with ``pairset`` in the same space: k attentions and k MLPs of a model dropped.

EvoPress (Sieberling et al., arXiv 2410.14649) prunes depth by evolution: at sparsity s it drops k = int(s L) attentions
and as many MLPs of L layers. Its protocol as published (``scripts/run_drop_search.sh`` of IST-DASLab/EvoPress): 64
random plans on 2,048 tokens, then k (L - k) / 1.5 generations of 32 offspring of the best plan, each by one to three
level switches (one branch restored, another of its kind dropped); the best 2 on 2,048 tokens and their parent are
compared on 32,768; each selection draws its windows anew; fitness is KL(base || plan).

Ours is one search for all sparsities. ``pairset`` evaluates ``--search-evaluations`` plans on ``--search-tokens``, with
levels of k attentions and k MLPs (``CountLevels``). Then each k has the rest of its tokens, ``--token-share`` of what
EvoPress took for it less those of the whole shared search: plans of least predicted loss, and exchanges of one branch
of the best, on ``--final-tokens``. ``any mix`` is the same with plain ``pairset`` where an attention and an MLP take
the same time: 2 k branches dropped, of either kind. So its plans drop as much depth but not as many of each kind.

``evopress-tokens`` and ``evopress-evaluations`` are the plans that EvoPress held when it had taken the tokens of ours,
and as many evaluations (each plan counts once a selection). Tokens are those of all plans evaluated; what the
unmodified model runs is left out for both. ``--calibration`` and ``--texts`` are files as ``windows_file.py`` writes
them, or .npy files of tokens (windows, seq_len).

    python studies/evopress.py --model smollm2-135m --calibration calibration.npz \
        --texts test.npz,code.npz,sampled.npz --sparsities 0.125,0.25,0.375 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace
from lpsearch.search.samplers.mixed import Levels
from lpsearch.search.samplers.time_levels import TimeLevels
from studies.count_levels import CountLevels
from studies.drop_search import DropSearch, Found
from studies.plan_batches import PlanBatchEvaluator
from studies.windows_file import get_windows

__all__ = ["Protocol", "count_generations", "run_evopress"]

MAX_REDRAWS = 200
"""Draws an offspring after which a generation stays smaller, where a space has no other plan."""


@dataclass(frozen=True)
class Protocol:
    """How EvoPress searches; the defaults are those published for depth pruning.

    Attributes:
        initial: random plans of the first selection.
        initial_tokens: on which they are compared.
        offspring: of a generation.
        survivors: of each stage of its selection.
        stage_tokens: on which the plans of each stage are compared.
        max_switches: most level switches of an offspring.
    """

    initial: int = 64
    initial_tokens: int = 2048
    offspring: int = 32
    survivors: tuple[int, ...] = (2, 1)
    stage_tokens: tuple[int, ...] = (2048, 32768)
    max_switches: int = 3


def count_generations(num_layers: int, num_dropped: int) -> int:
    """Return the published number of generations: k (L - k) / 1.5."""
    return int(num_dropped * (num_layers - num_dropped) / 1.5)


def run_evopress(
    evaluator: PlanBatchEvaluator,
    *,
    num_layers: int,
    num_dropped: int,
    generations: int,
    protocol: Protocol,
    seed: int,
) -> list[Found]:
    """Return the plan that EvoPress holds after the first selection and after each generation.

    Args:
        evaluator: of the calibration windows.
        num_layers: layers of the model.
        num_dropped: attentions, and MLPs, that each plan drops.
        generations: how many.
        protocol: how.
        seed: decides every draw.
    """
    rng = random.Random(seed)
    num_tokens = num_evaluations = 0

    def select(plans: list[Plan], survivors: int, tokens: int) -> list[Plan]:
        nonlocal num_tokens, num_evaluations
        before = evaluator.num_tokens
        kl = evaluator.evaluate(plans, _draw_windows(evaluator, tokens, rng)).kl.mean(axis=1)
        num_tokens += evaluator.num_tokens - before
        num_evaluations += len(plans)
        ranked = np.argsort(np.where(np.isfinite(kl), kl, np.inf), kind="stable")
        return [plans[row] for row in ranked[:survivors]]

    def draw() -> Plan:
        dropped = {branch: rng.sample(range(num_layers), num_dropped) for branch in ("attention", "mlp")}
        return Plan.baseline(num_layers).drop(dropped)

    first = _draw_distinct(draw, protocol.initial, ())
    population = select(first, protocol.survivors[-1], protocol.initial_tokens)
    history = [Found(population[0], num_evaluations, num_tokens)]
    for _ in range(generations):
        parents = tuple(population)
        plans = _draw_distinct(lambda: _mutate(rng.choice(parents), protocol, rng), protocol.offspring, parents)  # noqa: B023
        for stage, (survivors, tokens) in enumerate(zip(protocol.survivors, protocol.stage_tokens, strict=True)):
            if stage == len(protocol.survivors) - 1:
                plans = plans + [parent for parent in parents if parent not in plans]
            plans = select(plans, survivors, tokens)
        population = plans
        history.append(Found(population[0], num_evaluations, num_tokens))
    return history


def _draw_windows(evaluator: PlanBatchEvaluator, tokens: int, rng: random.Random) -> list[int]:
    return rng.sample(range(evaluator.num_windows), evaluator.count_windows(tokens))


def _draw_distinct(draw: Callable[[], Plan], count: int, known: Sequence[Plan]) -> list[Plan]:
    """Draw plans until there are as many as asked for, each once and none of those that are known."""
    plans: dict[Plan, None] = {}
    for _ in range(MAX_REDRAWS * count):
        plan = draw()
        if plan not in known:
            plans.setdefault(plan)
        if len(plans) == count:
            break
    return list(plans)


def _mutate(plan: Plan, protocol: Protocol, rng: random.Random) -> Plan:
    """Switch one to ``max_switches`` times a dropped branch for a kept one of its kind, mostly once."""
    dropped = {branch: set(layers) for branch, layers in plan.dropped.items()}
    for _ in range(min(rng.randint(1, protocol.max_switches), rng.randint(1, protocol.max_switches))):
        chosen = dropped[rng.choice(("attention", "mlp"))]
        entering = rng.choice([i for i in range(plan.num_layers) if i not in chosen])
        chosen.remove(rng.choice(sorted(chosen)))
        chosen.add(entering)
    return Plan.baseline(plan.num_layers).drop(dropped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table and the JSON lines, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except LpsearchError as error:
        print(f"evopress: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    began_at = time.monotonic()
    protocol = Protocol() if options.protocol is None else _read_protocol(options.protocol)
    device = resolve_device(options.device)
    loaded = load_model(resolve_source(options.model), device=device, dtype=getattr(torch, options.dtype))
    num_layers = loaded.identity.num_layers
    counts = _read_counts(options.sparsities, num_layers)
    options_of_windows: dict[str, Any] = {"num_windows": None, "seq_len": options.seq_len}
    calibration = get_windows(options.calibration, loaded, **options_of_windows)
    texts = {name: get_windows(name, loaded, **options_of_windows) for name in options.texts.split(",")}
    evaluator = PlanBatchEvaluator(loaded.model, calibration)
    peers: dict[int, list[Found]] = {}
    for count in counts:
        generations = count_generations(num_layers, count) if options.generations is None else options.generations
        peers[count] = run_evopress(
            evaluator,
            num_layers=num_layers,
            num_dropped=count,
            generations=generations,
            protocol=protocol,
            seed=options.seed,
        )
        _note(f"evopress, {count} of {num_layers}: {generations} generations, {time.monotonic() - began_at:.0f} s")
    found = _search(options, evaluator, peers, num_layers, began_at)
    rows = [_Row(count, method, item) for count in counts for method, item in found[count].items()]
    _note(f"perplexities, {time.monotonic() - began_at:.0f} s")
    plans = [row.found.plan for row in rows] + [Plan.baseline(num_layers)]
    calibrated = evaluator.evaluate(plans, range(evaluator.num_windows)).kl.mean(axis=1)
    perplexities: dict[str, Any] = {}
    for name, windows in texts.items():
        evaluated = PlanBatchEvaluator(loaded.model, windows)
        nll = evaluated.evaluate(plans, range(evaluated.num_windows)).nll.mean(axis=1)
        perplexities[Path(name).stem] = np.exp(nll).tolist()
    print(
        f"{'k':>3} {'method':<21} {'plans':>6} {'tokens':>10} {'KL':>8} "
        + " ".join(f"{name[:9]:>9}" for name in perplexities)
    )
    for index, row in enumerate(rows):
        row.print(float(calibrated[index]), {name: values[index] for name, values in perplexities.items()})
    return {
        "model": loaded.identity.id,
        "calibration": calibration.spec,
        "calibration_windows": calibration.num_windows,
        "seq_len": calibration.seq_len,
        "seed": options.seed,
        "unmodified": {name: values[-1] for name, values in perplexities.items()},
        "comparison": _compare(rows, perplexities),
        "elapsed_s": time.monotonic() - began_at,
        "dtype": options.dtype,
        "device": describe_device(device),
        "torch": torch.__version__,
    }


def _search(
    options: argparse.Namespace,
    evaluator: PlanBatchEvaluator,
    peers: dict[int, list[Found]],
    num_layers: int,
    began_at: float,
) -> dict[int, dict[str, Found]]:
    """Run our searches, and return by number of drops and method what was found."""
    space = PlanSpace(num_layers, allow=("drop-attention", "drop-mlp"))
    found = {count: {"evopress": history[-1]} for count, history in peers.items()}
    for method, levels in _build_levels(space, tuple(peers)).items():
        search = DropSearch(evaluator, space, levels, budget=options.search_evaluations, seed=options.seed)
        search.explore(evaluator.count_windows(options.search_tokens))
        _note(f"{method}: {search.num_evaluations} evaluations, {time.monotonic() - began_at:.0f} s")
        for count, history in peers.items():
            limit = int(options.token_share * history[-1].num_tokens)
            if limit < search.num_tokens:
                _note(f"{method}, {count}: the search alone took more than {options.token_share} of EvoPress's tokens")
            found[count][method] = search.refine(
                is_enough=_build_filter(method, count),
                num_windows=evaluator.count_windows(options.final_tokens),
                max_tokens=limit,
            )
        _note(f"{method}: refined, {time.monotonic() - began_at:.0f} s")
    for count, history in peers.items():
        ours = found[count][BALANCED]
        found[count]["evopress-tokens"] = _take_last(history, lambda item: item.num_tokens <= ours.num_tokens)  # noqa: B023
        found[count]["evopress-evaluations"] = _take_last(
            history,
            lambda item: item.num_evaluations <= ours.num_evaluations,  # noqa: B023
        )
    return found


BALANCED = "pairset"
ANY_MIX = "any mix"


def _build_levels(space: PlanSpace, counts: Sequence[int]) -> dict[str, Levels]:
    return {
        BALANCED: CountLevels(space, counts),
        ANY_MIX: TimeLevels(space, lambda plan: float(2 * plan.num_layers - plan.num_dropped)),
    }


def _build_filter(method: str, count: int) -> Callable[[Plan], bool]:
    """Return what says whether a plan drops as much as EvoPress's."""
    if method == ANY_MIX:
        return lambda plan: plan.num_dropped >= 2 * count
    return lambda plan: min(len(plan.dropped["attention"]), len(plan.dropped["mlp"])) >= count


def _take_last(history: Sequence[Found], is_within: Callable[[Found], bool]) -> Found:
    """Return what was held last within a limit; the first selection where nothing was."""
    return next((item for item in reversed(history) if is_within(item)), history[0])


@dataclass(frozen=True)
class _Row:
    """A line of the table."""

    count: int
    method: str
    found: Found

    def print(self, kl: float, perplexities: dict[str, float]) -> None:
        dropped = {branch: list(layers) for branch, layers in self.found.plan.dropped.items()}
        values = " ".join(f"{value:>9.3f}" for value in perplexities.values())
        print(
            f"{self.count:>3} {self.method:<21} {self.found.num_evaluations:>6} {self.found.num_tokens:>10} "
            f"{kl:>8.4f} {values}"
        )
        document = {
            "dropped_of_each": self.count,
            "method": self.method,
            "evaluations": self.found.num_evaluations,
            "tokens": self.found.num_tokens,
            "calibration_kl": kl,
            "perplexity": perplexities,
            "dropped": dropped,
        }
        print(json.dumps(document), flush=True)


def _compare(rows: Sequence[_Row], perplexities: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Say for every number of drops how the plans of ours stand to EvoPress's final plan."""
    compared = []
    for index, row in enumerate(rows):
        if row.method not in (BALANCED, ANY_MIX):
            continue
        peer = next(i for i, other in enumerate(rows) if (other.count, other.method) == (row.count, "evopress"))
        compared.append(
            {
                "dropped_of_each": row.count,
                "method": row.method,
                "token_share": row.found.num_tokens / rows[peer].found.num_tokens,
                "same_plan": row.found.plan == rows[peer].found.plan,
                "perplexity_ratio": {name: values[index] / values[peer] for name, values in perplexities.items()},
                "below_everywhere": all(values[index] < values[peer] for values in perplexities.values()),
            }
        )
    return compared


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _read_counts(sparsities: str, num_layers: int) -> list[int]:
    try:
        counts = [int(float(part) * num_layers) for part in sparsities.split(",")]
    except ValueError:
        raise ConfigError(f"--sparsities {sparsities}: give numbers with commas between") from None
    if not all(1 <= count < num_layers for count in counts):
        raise ConfigError(f"--sparsities {sparsities}: of {num_layers} layers these drop {counts}; drop 1 or more")
    return sorted(set(counts))


def _read_protocol(text: str) -> Protocol:
    """Read ``name=value`` pairs; values of several stages have a slash between."""
    protocol = Protocol()
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            if name not in Protocol.__dataclass_fields__:
                raise ValueError
            numbers = tuple(int(number) for number in value.split("/"))
        except ValueError:
            known = ", ".join(Protocol.__dataclass_fields__)
            raise ConfigError(f"--protocol {part}: give one of {known}, = and numbers with / between") from None
        is_list = isinstance(getattr(protocol, name), tuple)
        changed: Any = numbers if is_list else numbers[0]
        protocol = replace(protocol, **{name: changed})
    if len(protocol.survivors) != len(protocol.stage_tokens) or min(protocol.survivors) < 1:
        raise ConfigError(f"--protocol {text}: name as many survivors as stage_tokens, each at least 1")
    return protocol


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare EvoPress's depth search with pairset in its space.")
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--calibration", required=True, help="windows file that both search on")
    parser.add_argument("--texts", required=True, help="windows files for perplexity, with commas between")
    parser.add_argument("--seq-len", type=int, help="tokens to take of each window (default: all)")
    parser.add_argument("--sparsities", default="0.125,0.25,0.375", help="shares of the layers")
    parser.add_argument("--token-share", type=float, default=0.1, help="of EvoPress's tokens that ours may take")
    parser.add_argument("--search-evaluations", type=int, default=240, help="of the search for all sparsities")
    parser.add_argument("--search-tokens", type=int, default=2048, help="tokens of each of these")
    parser.add_argument("--final-tokens", type=int, default=16384, help="tokens of each later evaluation")
    parser.add_argument("--generations", type=int, help="of EvoPress (default: k (L - k) / 1.5, as published)")
    parser.add_argument("--protocol", help="other settings of EvoPress, e.g. offspring=8,stage_tokens=512/2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
