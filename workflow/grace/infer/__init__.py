"""Running a model, packed or plain: loading, decoding in batches, and answering a question about an image."""
