"""This implementation against recorded numbers of the published one: `osum-echat golden FAMILY FOLDER` (`check.py`)."""
