"""Running exported graphs with ONNX Runtime: sessions, text generation over a decoder graph, fair timing."""
