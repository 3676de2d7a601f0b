"""Readers of the field's dataset formats, and the embedded scenes."""

from vlprune.data.check import check_images
from vlprune.data.classes import match_labels
from vlprune.data.records import MissingSplitError, skipped_text
from vlprune.data.sets import KINDS, CaptionData, ClassData, Data, NlvrData, Pair, Question, VqaData
from vlprune.data.sources import (
    CAPTION_SOURCES,
    CLASS_SOURCES,
    IMAGE_SOURCES,
    NLVR_SOURCES,
    VQA_SOURCES,
    accepted,
    accepted_by,
    open_calibration,
    open_data,
    open_images,
)


__all__ = [
    "CAPTION_SOURCES",
    "CLASS_SOURCES",
    "IMAGE_SOURCES",
    "KINDS",
    "NLVR_SOURCES",
    "VQA_SOURCES",
    "CaptionData",
    "ClassData",
    "Data",
    "MissingSplitError",
    "NlvrData",
    "Pair",
    "Question",
    "VqaData",
    "accepted",
    "accepted_by",
    "check_images",
    "match_labels",
    "open_calibration",
    "open_data",
    "open_images",
    "skipped_text",
]
