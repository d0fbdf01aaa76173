"""The images of questions as the decoder takes them: each opened and sent through the vision tower once."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.preprocess import Pixels, pad_to_square
from grace.families import family_of
from grace.infer.prefill import ImageFeatures, image_features

if TYPE_CHECKING:
    from grace.evaluate.question import Question

MOST_WORKERS = 8  # each decodes some hundred images a second
FEATURE_BYTES = 1 << 30  # visual features kept for later questions about the same images
SHAPES = 1 << 16  # images whose size is remembered, for the models that are asked about them next
_shapes: dict[bytes, tuple[int, int]] = {}  # height and width as shown, by digest


class Unaskable(GraceError):
    """One question cannot be asked: `question` is its id, `reason` says why as in "row 3 has ..."."""

    def __init__(self, message: str, question: str, reason: str) -> None:
        super().__init__(message)
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple:
        return Unaskable, (str(self), self.question, self.reason)  # it travels between processes


Prepared = tuple[tuple[bytes, ...], dict[str, torch.Tensor] | Unaskable]


class ImageEncoder:
    """What a model's vision side makes of images.

    Args:
        kept: what the frozen tower makes of images, bf16 [n, d] by SHA-256, where that was kept.
        workers: processes that decode and preprocess images ahead of the model; None: by the machine.
    """

    def __init__(
        self, model: Any, processor: Any, kept: Mapping[bytes, torch.Tensor], workers: int | None = None
    ) -> None:
        self.model, self.kept = model, kept
        if workers is None:  # on a CPU the model itself wants every core
            workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1) if model.device.type == "cuda" else 0
        self.workers = workers
        self.family, self.pixels = family_of(processor), Pixels(processor.image_processor)
        self.mean = processor.image_processor.image_mean
        self._features: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self._held = 0
        self._prepared: Iterator[Prepared] = iter(())

    def sizes(self, question: "Question") -> list[tuple[int, int]]:
        """Height and width of each image as the model is shown it, from the headers alone."""
        found = []
        for digest, image in zip(question.digests, question.images, strict=True):
            height, width = _shapes.get(digest) or self._shape(question, digest, image)
            if reason := self.family.refusal(height, width):
                raise Unaskable(
                    f"question {question.id}: its image {reason}; leave it out",
                    question.id,
                    f"has an image that {reason}",
                )
            found.append((height, width))
        return found

    @staticmethod
    def _shape(question: "Question", digest: bytes, image: bytes) -> tuple[int, int]:
        try:
            height, width = EncodedImage.from_bytes(question.id, image).size()
        except GraceError as error:
            raise Unaskable(str(error), question.id, "has an image that cannot be decoded") from error
        if question.pad:
            height = width = max(height, width)
        if len(_shapes) == SHAPES:
            _shapes.clear()
        _shapes[digest] = height, width
        return height, width

    def ahead(self, batches: Sequence[Sequence["Question"]]) -> None:
        """Let the workers prepare the images of these batches, which are asked next and in this order."""
        self._prepared = iter(())
        if not self.workers or self.kept:
            return
        known, wanted = set(self._features), []
        for questions in batches:
            new = {d: (q, i) for q in questions for d, i in zip(q.digests, q.images, strict=True) if d not in known}
            known |= new.keys()
            wanted.append(new)
        if any(wanted):
            loader = DataLoader(
                _Images(self, wanted),  # type: ignore[arg-type]
                batch_size=None,
                num_workers=min(self.workers, len(wanted)),
                prefetch_factor=1,
                multiprocessing_context="fork",  # the workers see the images that are here; the model they leave alone
            )
            self._prepared = iter(loader)

    def __call__(self, questions: Sequence["Question"]) -> list[list[ImageFeatures]]:
        """The features of each question's images, each image looked at once while it is remembered."""
        wanted = {d: (q, image) for q in questions for d, image in zip(q.digests, q.images, strict=True)}
        here = {digest: self._features[digest] for digest in wanted if digest in self._features}
        found: dict[bytes, ImageFeatures] = {}
        digests, pixels = next(self._prepared, ((), {}))
        if isinstance(pixels, Unaskable):
            raise pixels
        if digests:
            found = dict(zip(digests, image_features(self.model, pixels), strict=True))
        new = {digest: shown for digest, shown in wanted.items() if digest not in here and digest not in found}
        if new:
            found |= dict(zip(new, self._look(new), strict=True))
        if found:
            for digest, features in found.items():
                here[digest] = self._features[digest] = features
                self._held += features.nbytes
            while self._held > FEATURE_BYTES:
                self._held -= self._features.popitem(last=False)[1].nbytes
        return [[here[digest] for digest in question.digests] for question in questions]

    def _look(self, new: Mapping[bytes, tuple["Question", bytes]]) -> list[ImageFeatures]:
        """The features of images not looked at yet."""
        if all(digest in self.kept for digest in new):
            features = torch.stack([self.kept[digest] for digest in new])
            projected = self.model.model.multi_modal_projector(features.to(self.model.device, self.model.dtype))
            return [ImageFeatures(each) for each in projected]
        return image_features(self.model, self.prepare(new))

    def prepare(self, new: Mapping[bytes, tuple["Question", bytes]]) -> dict[str, torch.Tensor]:
        """What the vision side takes of images: decoded, padded where that is asked, resized."""
        return self.pixels([self._open(question, image) for question, image in new.values()])

    def _open(self, question: "Question", image: bytes) -> Image.Image:
        """The decoded image, RGB, padded where that is asked."""
        try:
            opened = EncodedImage.from_bytes(question.id, image).open()
        except GraceError as error:
            raise Unaskable(str(error), question.id, "has an image that cannot be decoded") from error
        return pad_to_square(opened, self.mean) if question.pad else opened


class _Images:
    """What the workers make: by number of a batch, the digests of its new images and what the model takes of them."""

    def __init__(self, encoder: ImageEncoder, wanted: Sequence[Mapping[bytes, tuple["Question", bytes]]]) -> None:
        self.encoder, self.wanted = encoder, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> Prepared:
        new = self.wanted[number]
        try:
            return tuple(new), self.encoder.prepare(new) if new else {}
        except Unaskable as error:  # an exception of several arguments does not travel between processes
            return (), error
