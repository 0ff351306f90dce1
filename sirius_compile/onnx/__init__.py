"""ONNX: the entries of a program as graphs of standard operators, lowered from its documents."""
