"""Judging a draft: teacher-forced scores, decoding, calibration, plots."""
