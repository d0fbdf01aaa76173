"""Conversations about images, as the token sequences that every model of an experiment is trained on."""

from grace.data.batches import Batch, collate, plan_batches
from grace.data.conversations import Conversation, Message, Part, load_conversations
from grace.data.examples import Example, load_examples
from grace.data.images import EncodedImage
from grace.data.prepared import load_features, load_prepared, prepare_examples, prepare_features

__all__ = [
    "Batch",
    "Conversation",
    "EncodedImage",
    "Example",
    "Message",
    "Part",
    "collate",
    "load_conversations",
    "load_examples",
    "load_features",
    "load_prepared",
    "plan_batches",
    "prepare_examples",
    "prepare_features",
]
