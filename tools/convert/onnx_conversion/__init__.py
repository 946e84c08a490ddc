"""What `tools/convert/to_onnx.py` is made of."""
