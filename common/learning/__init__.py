"""What is optimised and measured: losses, class imbalance, metrics, seeds.

Pure functions of arrays and tensors; no files, no messages, no Flower.
"""
