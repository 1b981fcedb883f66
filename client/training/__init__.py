"""Local training: optimiser loop, objectives, augmentation, DP-SGD, automatic tuning.

Needs only PyTorch and timm; knows neither Flower nor DICOM, and reads no configuration files.
"""
