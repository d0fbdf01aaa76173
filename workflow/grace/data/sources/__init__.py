"""Conversations as others publish them: files of several kinds, record by record, checked and in one form."""

from grace.data.sources.files import Files, open_source
from grace.data.sources.record import BadRecord, ImageReference, Said, understand

__all__ = ["BadRecord", "Files", "ImageReference", "Said", "open_source", "understand"]
