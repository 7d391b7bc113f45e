"""The event files of TensorBoard, and what is in them."""
