"""Command lines that the help of each command ends with."""

from __future__ import annotations

__all__ = ["EXAMPLES"]

EXAMPLES: dict[str, tuple[str, ...]] = {
    "optimize": (
        "lpsearch optimize --model smollm2-135m --budget 40",
        "lpsearch optimize --model ./my-model --data my-text.jsonl --allow joins,drops --recover refit",
        "lpsearch optimize --model llama2-7b --dry-run",
    ),
    "evaluate": (
        "lpsearch evaluate studies/smollm2-135m/plans/joins-06.json",
        "lpsearch evaluate PLAN --data my-text.jsonl --tasks arc_easy,hellaswag --limit 200",
    ),
    "recover": ("lpsearch recover studies/smollm2-135m/plans/joins-06.json --method refit --out repaired",),
    "export": (
        "lpsearch export studies/smollm2-135m/plans/joins-06.json exported",
        "lpsearch export studies/smollm2-135m/plans/joins-06.json smollm2.gguf",
    ),
    "generate": ("lpsearch generate PLAN --prompt 'The capital of France is' --compare",),
    "profile": (
        "lpsearch profile --model llama3.1-8b --out h100.json",
        "lpsearch profile --model llama3.2-1b --engine llama.cpp --out llamacpp.json",
        "lpsearch profile --model llama3.1-8b --tp 2 --allow joins,drops --out two-h100.json",
    ),
    "report": ("lpsearch report studies/smollm2-135m",),
    "dashboard": ("lpsearch dashboard studies/smollm2-135m --port 8080",),
    "worker": ("lpsearch worker --storage postgresql://user:password@db.example/lpsearch --study smollm2-135m",),
    "models": ("lpsearch models",),
    "plan show": ("lpsearch plan show studies/smollm2-135m/plans/joins-06.json",),
    "plan validate": ("lpsearch plan validate PLAN --model smollm2-135m",),
    "plan diff": ("lpsearch plan diff plans/joins-05.json plans/joins-06.json",),
    "plan pick": (
        "lpsearch plan pick studies/smollm2-135m --max-delta 0.1",
        "lpsearch plan pick studies/smollm2-135m --min-speedup 1.05",
    ),
    "plan schema": ("lpsearch plan schema > plan.schema.json",),
    "cache show": ("lpsearch cache show",),
    "cache clear": ("lpsearch cache clear --yes",),
}
"""By the words of the command."""
