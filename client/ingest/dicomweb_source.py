"""Studies from a DICOMweb archive (PS3.18): QIDO-RS finds them, WADO-RS returns them as they are stored.

Proxies, certificates and passwords are configured as for `requests`: HTTPS_PROXY, REQUESTS_CA_BUNDLE and
~/.netrc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset

from client.ingest.selection import DicomStudy, StudyFilter, build_search_filters
from client.ingest.study_source import (
    FOREIGN_IMAGE_REASON,
    SERIES_KEYWORDS,
    STUDY_KEYWORDS,
    ArchiveSeries,
    ImageSink,
    check_complete,
    is_of_series,
    iter_selected_series,
    parse_study_answer,
)
from common.utils.errors import ConsiliumError

PAGE_SIZE = 100
MAX_ANSWERS = 1_000_000  # of one search
CONNECT_TIMEOUT = 20  # s
MAX_ATTEMPTS = 3  # with pauses of 2 s and 4 s, for a refused connection too


def open_dicomweb_source(url: str, timeout: float = 300) -> DicomwebSource:
    """Return the archive at a URL such as https://pacs/dicom-web; nothing is sent yet.

    `timeout` is the longest pause in an answer, in seconds. Raises ConsiliumError when the URL is invalid.
    """
    try:
        client = DICOMwebClient(url, timeout=(CONNECT_TIMEOUT, timeout))
    except ValueError:
        raise ConsiliumError(
            f"'{url}' is not a DICOMweb address; write it as https://pacs/dicom-web"
        ) from None
    client.set_http_retry_params(max_attempts=MAX_ATTEMPTS)
    return DicomwebSource(client)


class DicomwebSource:
    """A study source behind DICOMweb."""

    def __init__(self, client: DICOMwebClient) -> None:
        self._client = client
        self.not_offered: Counter[str] = Counter()

    def find_studies(self, study_filter: StudyFilter) -> Iterator[DicomStudy]:
        """Search for the selected studies."""
        for filters in build_search_filters(study_filter):
            search = partial(
                self._client.search_for_studies, search_filters=filters, fields=list(STUDY_KEYWORDS)
            )
            yield from map(parse_study_answer, _search_pages(search, "StudyInstanceUID"))

    def fetch_study(self, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
        """Fetch the study's selected series, image by image."""
        search = partial(self._client.search_for_series, study.uid, fields=list(SERIES_KEYWORDS))
        answers = list(_search_pages(search, "SeriesInstanceUID"))
        for series in iter_selected_series(answers, study_filter, sink):
            num_received = 0
            for image in self._iter_images(study, series):
                if not is_of_series(image, study.uid, series.uid):
                    sink.skip(FOREIGN_IMAGE_REASON)
                    continue
                sink.add(image)
                num_received += 1
            check_complete(num_received, series)

    def _iter_images(self, study: DicomStudy, series: ArchiveSeries) -> Iterator[Dataset]:
        as_stored = (("application/dicom", "*"),)
        request = partial(self._client.iter_series, study.uid, series.uid, media_types=as_stored)
        images = _call_archive(request)
        while (image := _call_archive(partial(next, images, None))) is not None:
            yield image


def _call_archive(call: Callable[[], Any]) -> Any:
    """Return the archive's answer.

    Raises ConsiliumError for a failure; the library's own messages quote the address with the study's UID.
    """
    try:
        return call()
    except requests.HTTPError as error:
        status = "an error"
        if error.response is not None:
            status = f"'{error.response.status_code} {error.response.reason}'"
        raise ConsiliumError(
            f"the archive answered with {status}; check its address and the password in ~/.netrc"
        ) from None
    except requests.RequestException as error:
        raise ConsiliumError(
            f"the archive cannot be reached ({type(error).__name__}); check address, network and certificate"
        ) from None
    except ValueError:
        raise ConsiliumError("the archive's answer is not DICOMweb; check the address") from None


def _search_pages(search: Callable[..., list[dict[str, Any]]], uid_keyword: str) -> Iterator[Dataset]:
    """Yield a search's answers, page by page, each once.

    Archives limit the size of an answer, and some ignore the offset and repeat the first page.
    """
    seen_uids: set[str] = set()
    for offset in range(0, MAX_ANSWERS, PAGE_SIZE):
        page = _call_archive(partial(search, limit=PAGE_SIZE, offset=offset))
        new_uids: set[str] = set()
        for answer in map(Dataset.from_json, page):
            uid = str(answer.get(uid_keyword, ""))
            if uid not in seen_uids:
                new_uids.add(uid)
                yield answer
        seen_uids |= new_uids
        if not new_uids or len(page) < PAGE_SIZE:
            return
