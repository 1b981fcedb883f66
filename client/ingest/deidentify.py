"""De-identify images: keep only what reading them needs, by the standard's basic profile.

The profile (PS3.15 Annex E, table E.1-1) and its actions are those of dicom-anonymizer (KitwareMedical),
edition 2026c, the one library we found that contains the standard's table: dicognito has a list of its own
(comments, descriptions and private elements stay) and hashes by MD5; deid needs a recipe written by hand.
This module adds what the library lacks: it does not look into sequences that the table does not name, makes
new UIDs at random at each start, and fills the items of a sequence that it could remove.

The profile alone trusts that scanners write no name where the table expects none (Manufacturer, ImageType, a
damaged number). So only the elements on the lists below reach it: numbers, words of DICOM's own vocabulary,
UIDs and the pixels. No free text and no private element is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from dicomanonymizer.simpledicomanonymizer import anonymize_dataset, delete, initialize_actions, replace_UID
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
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

Tag = tuple[int, ...]
ProfileAction = Callable[[Dataset, Any], None]

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
    SeriesNumber AcquisitionNumber InstanceNumber NumberOfFrames SamplesPerPixel PlanarConfiguration Rows
    Columns BitsAllocated BitsStored HighBit PixelRepresentation SmallestImagePixelValue
    LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit PixelSpacing ImagerPixelSpacing
    NominalScannedPixelSpacing PixelAspectRatio SliceThickness SpacingBetweenSlices SliceLocation
    ImagePositionPatient ImageOrientationPatient GantryDetectorTilt TableHeight RescaleSlope RescaleIntercept
    WindowCenter WindowWidth KVP XRayTubeCurrent ExposureTime Exposure DistanceSourceToDetector
    DistanceSourceToPatient ReconstructionDiameter DataCollectionDiameter SpiralPitchFactor
    SingleCollimationWidth TotalCollimationWidth PixelIntensityRelationshipSign LossyImageCompressionRatio
    InStackPositionNumber DimensionIndexValues LUTDescriptor LUTData
""")
CODE_KEYWORDS = _split_keywords("""
    ImageType FrameType Modality BodyPartExamined PatientPosition ViewPosition PatientOrientation Laterality
    ImageLaterality PhotometricInterpretation RescaleType ModalityLUTType PixelIntensityRelationship
    PresentationLUTShape VOILUTFunction LossyImageCompression LossyImageCompressionMethod BurnedInAnnotation
    PresentationIntentType PixelPresentation VolumetricProperties VolumeBasedCalculationTechnique
""")
ALLOWED_CODE_VALUES = _split_keywords("""
    ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER VOLUME OTHER NONE CT CR DX DR RG CHEST THORAX
    LUNG HFS HFP HFDR HFDL FFS FFP FFDR FFDL PA AP LL RL LAT LATERAL LLD LLO RLD RLO A P L R H F B U AF AH AL
    AR PF PH PL PR LF LH LA LP RF RH RA RP FR FL FA FP HR HL HA HP MONOCHROME1 MONOCHROME2 HU US OD LIN LOG
    DISP IDENTITY INVERSE LINEAR LINEAR_EXACT SIGMOID NO YES 00 01 MONOCHROME DISTORTED SAMPLED ISO_10918_1
    ISO_14495_1 ISO_15444_1 ISO_15444_15 FOR
""") | {"FOR PRESENTATION", "FOR PROCESSING"}
SEQUENCE_KEYWORDS = _split_keywords("""
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelMeasuresSequence
    PlanePositionSequence PlaneOrientationSequence PixelValueTransformationSequence FrameVOILUTSequence
    CTImageFrameTypeSequence FrameContentSequence ModalityLUTSequence VOILUTSequence
""")
# Elements that must be present and may be empty (type 2).
EMPTIED_KEYWORDS = _split_keywords("""
    StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName PatientBirthDate PatientSex
    Manufacturer PositionReferenceIndicator
""")
# Codes to which vendors add words of their own; the position of the first ones has a meaning.
EXTENSIBLE_CODE_KEYWORDS = {"ImageType", "FrameType"}


def exclusion_reason(dataset: Dataset, study_filter: StudyFilter) -> str:
    """Return why an object is not taken, or an empty text when it is.

    The reason quotes nothing of the object that could identify a patient.
    """
    sop_class = UID(str(dataset.get("SOPClassUID", "")))
    if sop_class not in IMAGE_SOP_CLASSES:
        is_registered = sop_class.name != sop_class
        kind = sop_class.name if is_registered else "an object of unknown kind"
        return f"{kind} is neither a CT image nor a radiograph"
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        return "annotations are burned into its pixels"
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        return "it is a colour image, such as a screenshot or a dose report"
    if "LOCALIZER" in [str(part).upper() for part in dataset.get("ImageType") or []]:
        return "it is a localiser"
    if not str(dataset.get("StudyInstanceUID", "")) or not str(dataset.get("SOPInstanceUID", "")):
        return "it has no StudyInstanceUID or no SOPInstanceUID"
    if not _has_all_pixels(dataset):
        return "its pixel data is missing or incomplete"
    modality = str(dataset.get("Modality", ""))
    body_part = str(dataset.get("BodyPartExamined", ""))
    return series_exclusion_reason(modality, body_part, study_filter)


def _has_all_pixels(dataset: Dataset) -> bool:
    """Return whether there are as many uncompressed pixels as the header says, or any compressed ones."""
    if "PixelData" not in dataset:
        return False
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return bool(dataset.PixelData)
    num_pixels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1)
    return len(dataset.PixelData) * 8 >= num_pixels * int(dataset.BitsAllocated)


def deidentify_dataset(dataset: Dataset, key: bytes) -> Dataset:
    """Replace the identity of patient, study, series and image by pseudonyms, in place; return the dataset.

    Pixels, compression and byte order stay as they are. client/ingest/pseudonyms.py makes the
    pseudonyms.
    """
    patient_id = str(dataset.get("PatientID") or "")
    patient = make_patient_pseudonym(key, patient_id, str(dataset.StudyInstanceUID))
    transfer_syntax = dataset.file_meta.TransferSyntaxUID
    _remove_unlisted(dataset)
    _apply_profile(dataset, key)
    dataset.PatientName = patient
    dataset.PatientID = patient
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = f"PS3.15 {PROFILE_EDITION} basic profile; only listed elements kept"
    dataset.DeidentificationMethodCodeSequence = [_make_profile_code()]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    # The preamble and the old file header may name the sender.
    dataset.preamble = b"\0" * 128
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return dataset


def _make_profile_code() -> Dataset:
    code = Dataset()
    code.CodeValue = "113100"
    code.CodingSchemeDesignator = "DCM"
    code.CodeMeaning = "Basic Application Confidentiality Profile"
    return code


def _remove_unlisted(dataset: Dataset) -> None:
    """Remove all that the lists do not allow, in the sequences too."""
    for tag in list(dataset.keys()):
        try:
            is_allowed = _reduce_to_allowed(dataset[tag])
        except Exception:  # a damaged value can fail in any way and cannot be judged
            is_allowed = False
        if not is_allowed:
            del dataset[tag]


def _reduce_to_allowed(element: DataElement) -> bool:
    """Reduce an element's value to what the lists allow; return False when the element must be removed."""
    keyword = keyword_for_tag(element.tag)
    values = _list_values(element)
    if keyword in EMPTIED_KEYWORDS:
        element.value = ""
        return True
    if keyword in SEQUENCE_KEYWORDS and element.VR == "SQ":
        for item in element.value:
            _remove_unlisted(item)
        return True
    if keyword in EXTENSIBLE_CODE_KEYWORDS:
        element.value = [_replace_unknown_code(str(value)) for value in values]
        return True
    if keyword in CODE_KEYWORDS:
        return ALLOWED_CODE_VALUES.issuperset(map(str, values))
    if keyword in NUMERIC_KEYWORDS:
        return keyword == "LUTData" or all(math.isfinite(float(value)) for value in values)
    return keyword in UID_KEYWORDS or keyword in ("SOPClassUID", "PixelData")


def _list_values(element: DataElement) -> list[Any]:
    if element.is_empty:
        return []
    if element.VM > 1:
        return list(element.value)
    return [element.value]


def _replace_unknown_code(code: str) -> str:
    return code if code in ALLOWED_CODE_VALUES else "OTHER"


def _apply_profile(dataset: Dataset, key: bytes) -> None:
    """Apply the basic profile, in the sequences too."""
    anonymize_dataset(dataset, base_rules_gen=lambda: dict(_profile_rules(key)))
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _apply_profile(item, key)


@cache
def _profile_rules(key: bytes) -> dict[Tag, ProfileAction]:
    """Return the profile's {tag: action}, with sequences deleted and UIDs replaced by those of the key."""
    rules: dict[Tag, ProfileAction] = {}
    for tag, action in initialize_actions(f"dicomfields_{PROFILE_EDITION}").items():
        if _is_sequence(tag):
            rules[tag] = delete
        elif action is replace_UID:
            rules[tag] = partial(_replace_uids, key)
        else:
            rules[tag] = action
    return rules


def _is_sequence(tag: Tag) -> bool:
    if len(tag) != 2:  # a repeating group
        return False
    return bool(keyword_for_tag(tag)) and dictionary_VR(tag) == "SQ"


def _replace_uids(key: bytes, dataset: Dataset, tag: Any) -> None:
    """Replace the one or more UIDs of an element."""
    element = dataset.get(tag)
    if element is None or not element.value:
        return
    if isinstance(element.value, str):
        element.value = make_uid(key, element.value)
    else:
        element.value = [make_uid(key, str(uid)) for uid in element.value]
