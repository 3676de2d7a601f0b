"""Readers of the field's dataset formats, and the embedded scenes."""

from vlprune.data.check import check_images
from vlprune.data.records import MissingSplitError, skipped_text
from vlprune.data.sets import CaptionData, Question, VqaData
from vlprune.data.sources import CAPTION_SOURCES, VQA_SOURCES, open_calibration, open_data


__all__ = [
    "CAPTION_SOURCES",
    "VQA_SOURCES",
    "CaptionData",
    "MissingSplitError",
    "Question",
    "VqaData",
    "check_images",
    "open_calibration",
    "open_data",
    "skipped_text",
]
