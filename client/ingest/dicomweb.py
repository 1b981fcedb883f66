"""Studies from an archive that speaks DICOMweb: QIDO-RS finds them, WADO-RS brings them (PS3.18), as they are stored.

Proxies, certificates and passwords are those of `requests`: HTTPS_PROXY, REQUESTS_CA_BUNDLE, ~/.netrc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset

from client.ingest.wanted import Source, Study, Taker, Wanted, queries, unwanted, whole
from common.errors import ConsiliumError

PAGE = 100
STUDY = ["StudyInstanceUID", "PatientID", "AccessionNumber", "NumberOfStudyRelatedInstances"]
SERIES = ["SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances"]


def dicomweb(url: str, timeout: float = 300) -> Source:
    """The archive at `url`, e.g. https://pacs/dicom-web; `timeout` in seconds, of a connection and of a pause in an answer."""
    try:
        client = DICOMwebClient(url, timeout=(20, timeout))
    except ValueError:
        raise ConsiliumError(f"'{url}' is no DICOMweb address; write it as https://pacs/dicom-web") from None
    client.set_http_retry_params(max_attempts=3)  # with pauses of 2 s and 4 s, of a refused connection too
    return Source(partial(_find, client), partial(_fetch, client), Counter())


def _asked(call: Callable[[], Any]) -> Any:
    """The answer; a failure as a sentence (the library's own hold the address with the study's UID in it)."""
    try:
        return call()
    except requests.HTTPError as error:
        said = f"{error.response.status_code} {error.response.reason}" if error.response is not None else "with an error"
        raise ConsiliumError(f"the archive answers {said}") from None
    except requests.RequestException as error:
        raise ConsiliumError(f"the archive cannot be reached ({type(error).__name__}); check address, network and certificate") from None
    except ValueError:
        raise ConsiliumError("the archive answers something that is no DICOMweb; check the address") from None


def _pages(search: Callable[..., list[dict[str, Any]]], key: str) -> Iterator[Dataset]:
    """All answers of a search, page by page, each once: archives limit an answer, and some know no offset."""
    seen: set[str] = set()
    for offset in range(0, 1_000_000, PAGE):
        page = [Dataset.from_json(answer) for answer in _asked(partial(search, limit=PAGE, offset=offset))]
        fresh = [answer for answer in page if str(answer.get(key, "")) not in seen]
        seen |= {str(answer.get(key, "")) for answer in fresh}
        yield from fresh
        if not fresh or len(page) < PAGE:
            return


def _find(client: DICOMwebClient, wanted: Wanted) -> Iterator[Study]:
    for filters in queries(wanted):
        for answer in _pages(partial(client.search_for_studies, search_filters=filters, fields=STUDY), "StudyInstanceUID"):
            said = [str(answer.get(word) or "") for word in STUDY]
            yield Study(*said)


def _fetch(client: DICOMwebClient, study: Study, wanted: Wanted, taker: Taker) -> None:
    for series in list(_pages(partial(client.search_for_series, study.uid, fields=SERIES), "SeriesInstanceUID")):
        uid, modality, body_part, count = (str(series.get(word) or "") for word in SERIES)
        reason = unwanted(modality, body_part, wanted)
        if reason:
            taker.skip(reason, int(count) if count.isdigit() else 1)
            continue
        images = _asked(partial(client.iter_series, study.uid, uid, media_types=(("application/dicom", "*"),)))
        came = 0
        while (image := _asked(partial(next, images, None))) is not None:
            taker.take(image)
            came += 1
        whole(came, count)
