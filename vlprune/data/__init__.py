"""Readers of the field's dataset formats, and the embedded scenes."""

from vlprune.data.check import check_images
from vlprune.data.classes import match_labels
from vlprune.data.records import MissingSplitError, skipped_text
from vlprune.data.sets import KINDS, CaptionData, ClassData, Data, Question, VqaData
from vlprune.data.sources import (
    CAPTION_SOURCES,
    CLASS_SOURCES,
    VQA_SOURCES,
    accepted,
    open_calibration,
    open_data,
    open_images,
)


__all__ = [
    "CAPTION_SOURCES",
    "CLASS_SOURCES",
    "KINDS",
    "VQA_SOURCES",
    "CaptionData",
    "ClassData",
    "Data",
    "MissingSplitError",
    "Question",
    "VqaData",
    "accepted",
    "check_images",
    "match_labels",
    "open_calibration",
    "open_data",
    "open_images",
    "skipped_text",
]
