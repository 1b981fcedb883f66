"""De-identification: only what reading the image needs stays, and that by the standard's basic profile (PS3.15 Annex E, Table E.1-1).

The profile's table and its actions are those of dicom-anonymizer (KitwareMedical), edition 2026c. Of the libraries looked at it is the one that has
the table: dicognito has a list of its own (comments, descriptions and private elements stay) and hashes by MD5; deid wants a recipe written by
hand. What it leaves undone is done here: it does not look into sequences that the table does not name, makes new UIDs by chance at each start, and
fills a sequence's items where it may remove the sequence.

The profile alone trusts that scanners write no name where the table expects none (Manufacturer, ImageType, a damaged number). So only elements on
the lists below come to it: numbers, words of DICOM's own vocabulary, UIDs and the pixels. No free text survives, private elements neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from dicomanonymizer.simpledicomanonymizer import anonymize_dataset, delete, initialize_actions, replace_UID
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

from client.ingest.pseudonyms import make_patient_pseudonym, make_uid
from client.ingest.selection import StudyFilter, series_exclusion_reason

PROFILE_EDITION = "2026c"
IMAGE_SOP_CLASSES = (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
)


def _split_keywords(text: str) -> frozenset[str]:
    return frozenset(text.split())


UID_KEYWORDS = {"StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"}
NUMERIC_KEYWORDS = _split_keywords("""
    SeriesNumber AcquisitionNumber InstanceNumber NumberOfFrames SamplesPerPixel PlanarConfiguration Rows Columns BitsAllocated BitsStored HighBit
    PixelRepresentation SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit PixelSpacing ImagerPixelSpacing
    NominalScannedPixelSpacing PixelAspectRatio SliceThickness SpacingBetweenSlices SliceLocation ImagePositionPatient ImageOrientationPatient
    GantryDetectorTilt TableHeight RescaleSlope RescaleIntercept WindowCenter WindowWidth KVP XRayTubeCurrent ExposureTime Exposure
    DistanceSourceToDetector DistanceSourceToPatient ReconstructionDiameter DataCollectionDiameter SpiralPitchFactor SingleCollimationWidth
    TotalCollimationWidth PixelIntensityRelationshipSign LossyImageCompressionRatio InStackPositionNumber DimensionIndexValues
    LUTDescriptor LUTData
""")
CODE_KEYWORDS = _split_keywords("""
    ImageType FrameType Modality BodyPartExamined PatientPosition ViewPosition PatientOrientation Laterality ImageLaterality
    PhotometricInterpretation RescaleType ModalityLUTType PixelIntensityRelationship PresentationLUTShape VOILUTFunction LossyImageCompression
    LossyImageCompressionMethod BurnedInAnnotation PresentationIntentType PixelPresentation VolumetricProperties
    VolumeBasedCalculationTechnique
""")
ALLOWED_CODE_VALUES = _split_keywords("""
    ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER VOLUME OTHER NONE CT CR DX DR RG CHEST THORAX LUNG HFS HFP HFDR HFDL FFS FFP FFDR FFDL
    PA AP LL RL LAT LATERAL LLD LLO RLD RLO A P L R H F B U AF AH AL AR PF PH PL PR LF LH LA LP RF RH RA RP FR FL FA FP HR HL HA HP
    MONOCHROME1 MONOCHROME2 HU US OD LIN LOG DISP IDENTITY INVERSE LINEAR LINEAR_EXACT SIGMOID NO YES 00 01 MONOCHROME DISTORTED SAMPLED
    ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_15444_15 FOR
""") | {"FOR PRESENTATION", "FOR PROCESSING"}
SEQUENCE_KEYWORDS = _split_keywords("""
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelMeasuresSequence PlanePositionSequence PlaneOrientationSequence
    PixelValueTransformationSequence FrameVOILUTSequence CTImageFrameTypeSequence FrameContentSequence ModalityLUTSequence VOILUTSequence
""")
# Must be there, may be empty (type 2).
EMPTIED_KEYWORDS = _split_keywords("""
    StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName PatientBirthDate PatientSex Manufacturer
    PositionReferenceIndicator
""")


def exclusion_reason(dataset: Dataset, study_filter: StudyFilter) -> str:
    """Why an object is not taken, empty when it is. No word of it is the object's own."""
    kind = UID(str(dataset.get("SOPClassUID", "")))
    if kind not in IMAGE_SOP_CLASSES:
        return f"{kind.name if kind.name != kind else 'an object of unknown kind'}: no CT image and no radiograph"
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        return "annotations are burned into its pixels"
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        return "a colour image: a screenshot or a dose report"
    if "LOCALIZER" in [str(part).upper() for part in dataset.get("ImageType") or []]:
        return "a localiser"
    if not str(dataset.get("StudyInstanceUID", "")) or not str(dataset.get("SOPInstanceUID", "")):
        return "it has no UIDs"
    if not _has_all_pixels(dataset):
        return "its pixels are not there, or not all of them"
    return series_exclusion_reason(
        str(dataset.get("Modality", "")), str(dataset.get("BodyPartExamined", "")), study_filter
    )


def _has_all_pixels(dataset: Dataset) -> bool:
    """Whether uncompressed pixels are as many as the header says; compressed ones are there, and their end is."""
    if "PixelData" not in dataset:
        return False
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return bool(dataset.PixelData)
    bits = (
        int(dataset.Rows)
        * int(dataset.Columns)
        * int(dataset.get("NumberOfFrames") or 1)
        * int(dataset.BitsAllocated)
    )
    return len(dataset.PixelData) * 8 >= bits


@cache
def _profile_rules(key: bytes) -> dict[tuple[int, ...], Callable[[Dataset, Any], None]]:
    """The profile's table: what to do with each element. Named sequences go, UIDs become the key's."""

    def renamed(dataset: Dataset, tag: Any) -> None:
        element = dataset.get(tag)
        if element is not None and element.value:
            old = element.value
            element.value = (
                make_uid(key, old) if isinstance(old, str) else [make_uid(key, str(one)) for one in old]
            )

    rules: dict[tuple[int, ...], Callable[[Dataset, Any], None]] = {}
    for tag, action in initialize_actions(f"dicomfields_{PROFILE_EDITION}").items():
        sequence = len(tag) == 2 and keyword_for_tag(tag) and dictionary_VR(tag) == "SQ"
        rules[tag] = delete if sequence else renamed if action is replace_UID else action
    return rules


def _apply_profile(dataset: Dataset, key: bytes) -> None:
    """The basic profile, in the sequences too."""
    anonymize_dataset(dataset, base_rules_gen=lambda: dict(_profile_rules(key)))
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _apply_profile(item, key)


def _remove_unlisted(dataset: Dataset) -> None:
    for tag in list(dataset.keys()):
        word = keyword_for_tag(tag)
        try:
            element = dataset[tag]
            values = [] if element.is_empty else list(element.value) if element.VM > 1 else [element.value]
            if word in EMPTIED_KEYWORDS:
                element.value = ""
            elif word in SEQUENCE_KEYWORDS and element.VR == "SQ":
                for item in element.value:
                    _remove_unlisted(item)
            elif word in (
                "ImageType",
                "FrameType",
            ):  # vendors add words of their own; the first ones' places have a meaning
                element.value = [v if v in ALLOWED_CODE_VALUES else "OTHER" for v in map(str, values)]
            elif not (
                word in UID_KEYWORDS
                or word in ("SOPClassUID", "PixelData")
                or (word in CODE_KEYWORDS and all(str(v) in ALLOWED_CODE_VALUES for v in values))
                or (
                    word in NUMERIC_KEYWORDS
                    and (word == "LUTData" or all(math.isfinite(float(v)) for v in values))
                )
            ):
                del dataset[tag]
        except Exception:  # a damaged value fails in any way: it cannot be judged, so it goes
            del dataset[tag]


def deidentify_dataset(dataset: Dataset, key: bytes) -> Dataset:
    """The same image with the site's names for patient, study, series and image; it changes `dataset` and hands it back.

    The pixels, their compression and the byte order stay. Names of patients and studies are `client.ingest.pseudonyms`'s.
    """
    patient = make_patient_pseudonym(key, str(dataset.get("PatientID") or ""), str(dataset.StudyInstanceUID))
    syntax = dataset.file_meta.TransferSyntaxUID
    _remove_unlisted(dataset)
    _apply_profile(dataset, key)
    dataset.PatientName = dataset.PatientID = patient
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = f"PS3.15 {PROFILE_EDITION} basic profile; only listed elements kept"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = (
        "113100",
        "DCM",
        "Basic Application Confidentiality Profile",
    )
    dataset.DeidentificationMethodCodeSequence = [code]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    dataset.preamble = b"\0" * 128  # it and the file's own header may name the sender
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return dataset
