"""Readers of the field's dataset formats, and the embedded scenes."""

from vlprune.data.sets import CaptionData, Question, VqaData


__all__ = ["CaptionData", "Question", "VqaData"]
