"""The kinds of conversion that can be judged: what each must keep, and the checks that show that it did.

A new kind is a class like those below, and its place in `parity.verify`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity.parents import Parent
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.session import Judge

Made = TypeVar("Made", bound=Parent)


class Kind(ABC, Generic[Made]):
    """Conversions of one family to one other.

    Attributes:
        sources: The `model_type`s of what is converted.
        targets: The `model_type`s of what comes of it.
        parities: The checks that compare what both compute.
        part: What is taken out of the source; None where it is converted whole.
    """

    sources: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]]
    parities: ClassVar[tuple[str, ...]]
    part: ClassVar[str | None] = None

    @abstractmethod
    def parent(self, sources: Sources) -> Made:
        """What was converted, understood.

        Raises:
            CheckpointError: It is of another family, or cannot be computed.
        """

    @abstractmethod
    def read(self, target: Checkpoint) -> object:
        """The settings of a converted folder.

        Raises:
            CheckpointError: They cannot be read.
        """

    @abstractmethod
    def against(self, judge: Judge, parent: Made, target: Checkpoint) -> None:
        """Make the checks that compare a folder with its parent, but for provenance."""

    @abstractmethod
    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Whether the model does by itself what such a model is for."""
