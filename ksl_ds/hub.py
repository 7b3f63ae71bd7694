"""Why a model or dataset cannot be had from the Hugging Face Hub, as part of a sentence.

The messages of the Hub's clients have many lines and name no remedy, or another one than ours. `huggingface_hub` and
transformers chain exceptions, so the cause is found; `datasets` drops it, and its kind is in the message.
"""

from __future__ import annotations

from collections.abc import Iterator

from ksl_ds.errors import reason_of


def hub_reason(error: BaseException, page: str) -> str:
    """What is wrong and what to do, in one line.

    Parameters
    ----------
    error
        What `huggingface_hub`, transformers or `datasets` raised.
    page
        Path of the repository's page on the Hub: `org/model` or `datasets/org/dataset`.
    """
    return next(filter(None, (_remedy(cause, page) for cause in _chain(error))), reason_of(error.__cause__ or error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those from which it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _remedy(error: BaseException, page: str) -> str | None:
    """None for an exception that does not say."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    kind = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error):
        return "it is not complete in the cache, and HF_HUB_OFFLINE forbids to download it"
    if isinstance(error, errors.GatedRepoError) or ("DatasetNotFoundError" in kind and "gated" in str(error)):
        return f"it is gated; ask for access at {hub}/{page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError) or ("DatasetNotFoundError" in kind and "Revision" in str(error)):
        return "there is no such revision; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError) or "DatasetNotFoundError" in kind:
        return "there is no such repository, or it is private; check the id, or log in with `hf auth login`"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{error.response.url} is missing there"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{hub} answers {error.response.status_code} {error.response.reason_phrase}; try again later"
    # The HTTP library's, by name: it is not the same in all versions of huggingface_hub.
    if isinstance(error, ConnectionError) or "TransportError" in kind:
        return f"no connection to {hub} ({reason_of(error)}); check the network and HF_ENDPOINT"
    return None
