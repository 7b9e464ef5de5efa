"""Datasets of the hub, streamed, so that only what is needed of a large one is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lpsearch.data.columns import select_values
from lpsearch.errors import DataError, SourceError, describe_error

__all__ = ["WIKITEXT_ID", "check_hub_reachable", "read_hub_values"]

WIKITEXT_ID = "Salesforce/wikitext"

_HUB_PROBE_TIMEOUT_S = 5
_MEND = (
    "give a local file with --data FILE, use --data self, which needs no download, or set HF_HUB_OFFLINE=1 if it was "
    "downloaded before"
)


def read_hub_values(
    dataset_id: str, *, config: str | None, split: str | None, column: str | None, spec: str
) -> Iterator[Any]:
    """Yield the values of a dataset's text column.

    Args:
        dataset_id: id of the dataset on the hub.
        config: its configuration; None takes the only one.
        split: its split; None takes validation, test or train, the first that exists.
        column: the column that holds the text; None finds it.
        spec: what the user wrote, for messages.

    Raises:
        DataError: if the dataset, its split or its column does not exist or is not clear.
        SourceError: if the dataset cannot be fetched now.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    offline = datasets.config.HF_HUB_OFFLINE
    check_hub_reachable(dataset_id)
    # The small default is stored whole in the cache of `datasets`; without a network only that cache can answer.
    streaming = dataset_id != WIKITEXT_ID and not offline
    try:
        name = split or _choose_split(datasets.get_dataset_split_names(dataset_id, config))
        dataset = datasets.load_dataset(dataset_id, config, split=name, streaming=streaming)
        yield from select_values(dataset, column, where=spec)
    except DatasetNotFoundError as error:
        raise SourceError(f"dataset {dataset_id}: {error}") from None
    except ConnectionError as error:
        hint = "unset HF_HUB_OFFLINE or download it first" if offline else "try again, or give a local file"
        raise SourceError(f"dataset {dataset_id} cannot be fetched: {error}; {hint}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        # `datasets` reports a missing or unknown configuration or split this way, and lists those that exist.
        raise DataError(f"dataset {spec}: {error}; write ID:CONFIG:SPLIT") from None


def check_hub_reachable(dataset_id: str, *, subject: str = "dataset", mend: str = _MEND) -> None:
    """Ask the hub for a dataset once, since `datasets` itself retries for minutes; never where it is set to offline.

    Args:
        dataset_id: id of the dataset on the hub.
        subject: what it is, for messages, e.g. ``task arc_easy: its dataset``.
        mend: what else to do where the hub does not answer.

    Raises:
        DataError: if there is no such dataset.
        SourceError: if it is gated or the hub does not answer within seconds.
    """
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from lpsearch.models.hub import call_within

    api = HfApi()
    try:
        call_within(_HUB_PROBE_TIMEOUT_S, lambda: api.dataset_info(dataset_id, timeout=_HUB_PROBE_TIMEOUT_S))
    except GatedRepoError:
        raise SourceError(
            f"{subject} {dataset_id} is gated; accept its terms at {api.endpoint}/datasets/{dataset_id} and log in "
            "with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{subject} {dataset_id} is neither a local file nor on the hub at {api.endpoint} (a private one needs "
            "`hf auth login`); check the spelling"
        ) from None
    except Exception as error:  # the HTTP client under the hub library differs between its versions
        reason = describe_error(error)
        raise SourceError(f"{subject} {dataset_id} cannot be reached at {api.endpoint}: {reason}; {mend}") from None


def _choose_split(names: Sequence[str]) -> str:
    for name in ("validation", "test", "train"):
        if name in names:
            return name
    raise DataError(f"no split was named and none of {', '.join(names)} is validation, test or train")
