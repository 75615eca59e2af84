"""Whether the Hugging Face hub answers: asked once in a process. After a silence its libraries read their caches alone.

Otherwise each file of each data set and model is asked for, with five retries, before the cache is read.
"""

from __future__ import annotations

import functools
import logging
import os
import sys

SECONDS = 5
REMEDY = "correct the id, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
log = logging.getLogger(__name__)


@functools.cache
def reach_hub() -> bool:
    """Return whether the hub answers; where it does not, switch its libraries offline for the rest of the process, and warn.

    A process that was started offline (HF_HUB_OFFLINE) asks nothing.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)  # any answer is one; proxies and certificates are the library's
    except Exception as error:  # of whichever client the library uses
        log.warning(
            "%s does not answer (%s); models and data sets come from local caches alone. HF_HUB_OFFLINE=1 spares the question",
            constants.ENDPOINT,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        _go_offline()
        return False
    return True


def _go_offline() -> None:
    """Do what HF_HUB_OFFLINE=1 does at the start of a process; children inherit it."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")  # it keeps a copy; imported later, it takes ours
    if datasets is not None:
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
