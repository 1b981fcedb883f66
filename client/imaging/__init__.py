"""From files to slices: lung segmentation, slice selection, preprocessing, the slice store.

Knows neither labels nor training nor messages.
"""
