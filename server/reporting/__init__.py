"""What a finished run leaves: report, figures, model card, exports, TensorBoard.

Reads results and changes none.
"""
