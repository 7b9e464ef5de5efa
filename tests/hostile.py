"""Files that somebody else wrote: valid documents, and what a hostile or broken program makes of them."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

__all__ = ["FRONT", "PLAN", "PROFILE", "broken_bytes", "changed_documents"]

_LOSS = {"nll": 3.1, "delta_nll": 0.1, "delta_nll_se": 0.01, "perplexity": 22.2}
_MEASURED = {
    **_LOSS,
    "variant": "raw",
    "data": "wikitext2:validation",
    "windows": 2,
    "seq_len": 8,
    "num_tokens": 14,
    "dtype": "float32",
    "device": "cpu",
    "by_kind": [{**_LOSS, "data": "a.txt", "weight": 1.0, "windows": 2, "num_tokens": 14}],
}

PLAN: dict[str, Any] = {
    "schema_version": 2,
    "model": {"id": "owner/tiny", "revision": "main", "num_layers": 6, "fingerprint": "aa-bb"},
    "groups": [[0], [1, 2], [3], [4], [5]],
    "dropped": {"attention": [4], "mlp": []},
    "depth": 4.5,
    "depth_reduction": 0.25,
    "metrics": {
        "proxy": _MEASURED,
        "heldout": None,
        "latency": {
            "kind": "estimated",
            "latency_ms": 9.0,
            "baseline_latency_ms": 10.0,
            "speedup": 1.111,
            "batch_size": 1,
            "context_len": 1024,
            "dtype": "float32",
            "device": "cpu",
            "runtime": "eager",
            "versions": {"torch": "2"},
            "mean_error": 0.2,
            "kv_bytes_per_token": 4096,
        },
    },
    "provenance": {"study": "tiny", "trial": 3, "seed": 0, "versions": {}, "created_at": "2026-11-01T00:00:00+00:00"},
}

_KINDS = {"2 full": 0.3, "1 full": 0.2}

PROFILE: dict[str, Any] = {
    "schema_version": 2,
    "device": "cpu",
    "num_threads": 1,
    "dtype": "float32",
    "versions": {"torch": "2"},
    "geometry": {
        "model_type": "llama",
        "num_layers": 6,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 512,
        "layer_kinds": ["full"] * 6,
        "attention_windows": {"sliding": 4},
    },
    "runtime": "eager",
    "workloads": [
        {
            "kind": "decode",
            "batch_size": 1,
            "context_len": 64,
            "num_layers_measured": 6,
            "points": [
                {"num_groups": {"1 full": 6}, "use": "fit", "median_ms": 1, "p10_ms": 1, "p90_ms": 1, "num_samples": 30}
            ],
            "overhead_ms": 0.1,
            "cost_ms": _KINDS,
            "check_error": 0.01,
            "unmodified_ms": {"eager": 1.3},
        }
    ],
    "created_at": "2026-11-01T00:00:00+00:00",
}

FRONT: dict[str, Any] = {
    "schema_version": 1,
    "study": "tiny",
    "model": PLAN["model"],
    "objective": "depth",
    "metric": "nll",
    "trials": 2,
    "exact": False,
    "baseline_nll": 3.0,
    "proxy_tokens": 28,
    "heldout_tokens": 28,
    "front": [
        {
            "plan": f"plans/joins-0{num_joins}.json",
            "num_joins": num_joins,
            "depth_reduction": num_joins / 6,
            "delta_nll": 0.1 * num_joins,
            "delta_nll_se": 0.01,
            "heldout_delta_nll": 0.1 * num_joins,
            "heldout_delta_nll_se": 0.01,
            "kl_nats_per_token": None,
            "perplexity": 22.0,
            "latency_ms": 1.0,
            "speedup": 1.0 + num_joins / 10,
            "groups": [[0], [1], [2], [3], [4], [5]] if num_joins == 0 else [[0], [1, 2], [3], [4], [5]],
            "origin": "scan",
            "trial": num_joins,
        }
        for num_joins in (0, 1)
    ],
}

_ODD_TEXTS = (
    *("", "\x00", "\x1b]0;owned\x07", "\u202etxt", "\ud800", "a" * 5000, "~nobody-of-this-name/x", "../../x", "/"),
    *("<script>alert(1)</script>", "plans/../../x.json", "%s %d {0}", "1 full", "no attention, ", "self", "raw"),
)
_ODD_NUMBERS = (
    *(0, -1, 1, 2, 5, 6, 4301, 10**12, 2**63, 2**64, 10**400, -(10**400)),
    *(1e308, -1e308, 5e-324, 1e-6, 0.5, -0.0),
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(_ODD_TEXTS)
    | st.sampled_from(_ODD_NUMBERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_documents(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """Return a document in which one to three values, at any depth, were replaced, removed, copied or added."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_list_places(document))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("replace", "replace", "number", "text", "remove", "copy", "add")))
        if change == "remove":
            del holder[key]
        elif change == "copy":
            other, at = draw(st.sampled_from(places))
            if isinstance(other, list) or at in other:
                holder[key] = copy.deepcopy(other[at]) if not isinstance(other, list) or at < len(other) else None
        elif change == "add":
            if isinstance(holder, dict):
                holder[draw(st.text(st.characters(exclude_categories=()), max_size=6))] = draw(json_values)
            else:
                holder.append(draw(json_values))
        else:
            odd = {"number": st.sampled_from(_ODD_NUMBERS), "text": st.sampled_from(_ODD_TEXTS)}
            holder[key] = draw(odd.get(change, json_values))
    return document


@st.composite
def broken_bytes(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """Return the bytes of a document of which a part was cut out, doubled or overwritten."""
    content = json.dumps(valid).encode()
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 40)))
    odd = (b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"1e999")
    middle = draw(st.binary(max_size=12) | st.sampled_from(odd))
    return content[:start] + draw(st.sampled_from((middle, content[start:stop] * 2, b""))) + content[stop:]


def _list_places(document: Any) -> Any:
    """Yield each value of a document as what holds it, and its key or index there."""
    keys = list(document) if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _list_places(document[key])
