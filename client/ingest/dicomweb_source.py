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

from client.ingest.selection import (
    DicomStudy,
    ImageSink,
    StudyFilter,
    StudySource,
    build_search_filters,
    check_complete,
    series_exclusion_reason,
)
from common.utils.errors import ConsiliumError

PAGE_SIZE = 100
STUDY_KEYWORDS = ["StudyInstanceUID", "PatientID", "AccessionNumber", "NumberOfStudyRelatedInstances"]
SERIES_KEYWORDS = ["SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances"]


def open_dicomweb_source(url: str, timeout: float = 300) -> StudySource:
    """The archive at `url`, e.g. https://pacs/dicom-web; `timeout` in seconds, of a connection and of a pause in an answer."""
    try:
        client = DICOMwebClient(url, timeout=(20, timeout))
    except ValueError:
        raise ConsiliumError(f"'{url}' is no DICOMweb address; write it as https://pacs/dicom-web") from None
    client.set_http_retry_params(max_attempts=3)  # with pauses of 2 s and 4 s, of a refused connection too
    return StudySource(partial(_find_studies, client), partial(_fetch_study, client), Counter())


def _call_archive(call: Callable[[], Any]) -> Any:
    """The answer; a failure as a sentence (the library's own hold the address with the study's UID in it)."""
    try:
        return call()
    except requests.HTTPError as error:
        said = (
            f"{error.response.status_code} {error.response.reason}"
            if error.response is not None
            else "with an error"
        )
        raise ConsiliumError(f"the archive answers {said}") from None
    except requests.RequestException as error:
        raise ConsiliumError(
            f"the archive cannot be reached ({type(error).__name__}); check address, network and certificate"
        ) from None
    except ValueError:
        raise ConsiliumError("the archive answers something that is no DICOMweb; check the address") from None


def _search_pages(search: Callable[..., list[dict[str, Any]]], key: str) -> Iterator[Dataset]:
    """All answers of a search, page by page, each once: archives limit an answer, and some know no offset."""
    seen: set[str] = set()
    for offset in range(0, 1_000_000, PAGE_SIZE):
        page = [
            Dataset.from_json(answer)
            for answer in _call_archive(partial(search, limit=PAGE_SIZE, offset=offset))
        ]
        fresh = [answer for answer in page if str(answer.get(key, "")) not in seen]
        seen |= {str(answer.get(key, "")) for answer in fresh}
        yield from fresh
        if not fresh or len(page) < PAGE_SIZE:
            return


def _find_studies(client: DICOMwebClient, study_filter: StudyFilter) -> Iterator[DicomStudy]:
    for filters in build_search_filters(study_filter):
        for answer in _search_pages(
            partial(client.search_for_studies, search_filters=filters, fields=STUDY_KEYWORDS),
            "StudyInstanceUID",
        ):
            said = [str(answer.get(word) or "") for word in STUDY_KEYWORDS]
            yield DicomStudy(*said)


def _fetch_study(
    client: DICOMwebClient, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink
) -> None:
    for series in list(
        _search_pages(
            partial(client.search_for_series, study.uid, fields=SERIES_KEYWORDS), "SeriesInstanceUID"
        )
    ):
        uid, modality, body_part, count = (str(series.get(word) or "") for word in SERIES_KEYWORDS)
        reason = series_exclusion_reason(modality, body_part, study_filter)
        if reason:
            sink.skip(reason, int(count) if count.isdigit() else 1)
            continue
        images = _call_archive(
            partial(client.iter_series, study.uid, uid, media_types=(("application/dicom", "*"),))
        )
        came = 0
        while (image := _call_archive(partial(next, images, None))) is not None:
            sink.add(image)
            came += 1
        check_complete(came, count)
