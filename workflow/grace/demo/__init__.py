"""The demo experiment's world: real garments, handwriting and photographs,
composed into small images with questions.
"""
