"""The images of questions as the decoder takes them: each opened and sent through the vision tower once."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.preprocess import Pixels, pad_to_square
from grace.infer.prefill import Seen, see
from grace.models.families import family_of

if TYPE_CHECKING:
    from grace.evaluate.runner import Question

FEATURE_BYTES = 1 << 30  # visual features kept for later questions about the same images


class Unaskable(GraceError):
    """One question cannot be asked: `question` is its id, `reason` says why as in "row 3 has ..."."""

    def __init__(self, message: str, question: str, reason: str) -> None:
        super().__init__(message)
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple:
        return Unaskable, (str(self), self.question, self.reason)  # it travels between processes


class Sight:
    """What a model's vision side makes of images.

    Args:
        kept: what the frozen tower makes of images, bf16 [n, d] by SHA-256, where that was kept.
    """

    def __init__(self, model: Any, processor: Any, kept: Mapping[bytes, torch.Tensor]) -> None:
        self.model, self.kept = model, kept
        self.family, self.pixels = family_of(processor), Pixels(processor.image_processor)
        self.mean = processor.image_processor.image_mean
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._held = 0

    def sizes(self, question: "Question") -> list[tuple[int, int]]:
        """Height and width of each image as the model is shown it, from the headers alone."""
        found = []
        for image in question.images:
            try:
                height, width = EncodedImage.from_bytes(question.id, image).size()
            except GraceError as error:
                raise Unaskable(str(error), question.id, "has an image that cannot be decoded") from error
            if question.pad:
                height = width = max(height, width)
            if reason := self.family.refusal(height, width):
                raise Unaskable(
                    f"question {question.id}: its image {reason}; leave it out",
                    question.id,
                    f"has an image that {reason}",
                )
            found.append((height, width))
        return found

    def __call__(self, questions: Sequence["Question"]) -> list[list[Seen]]:
        """What is seen of each question's images, each image looked at once while it is remembered."""
        wanted = {d: (q, image) for q in questions for d, image in zip(q.digests, q.images, strict=True)}
        here = {digest: self._seen[digest] for digest in wanted if digest in self._seen}
        new = {digest: shown for digest, shown in wanted.items() if digest not in here}
        if new:
            for digest, seen in zip(new, self._look(new), strict=True):
                here[digest] = self._seen[digest] = seen
                self._held += seen.nbytes
            while self._held > FEATURE_BYTES:
                self._held -= self._seen.popitem(last=False)[1].nbytes
        return [[here[digest] for digest in question.digests] for question in questions]

    def _look(self, new: Mapping[bytes, tuple["Question", bytes]]) -> list[Seen]:
        """What is seen of images not looked at yet."""
        if all(digest in self.kept for digest in new):
            features = torch.stack([self.kept[digest] for digest in new])
            projected = self.model.model.multi_modal_projector(features.to(self.model.device, self.model.dtype))
            return [Seen(each) for each in projected]
        return see(self.model, self.pixels([self._open(question, image) for question, image in new.values()]))

    def _open(self, question: "Question", image: bytes) -> Image.Image:
        """The decoded image, RGB, padded where that is asked."""
        try:
            opened = EncodedImage.from_bytes(question.id, image).open()
        except GraceError as error:
            raise Unaskable(str(error), question.id, "has an image that cannot be decoded") from error
        return pad_to_square(opened, self.mean) if question.pad else opened
