"""One micro-batch without padding, as the model and the trainer take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapo.data.pictures import Picture

# For the annotations only: the processes that judge answers need the text, not a tensor library.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """A run of packed tokens that attends to itself (causally) and to the whole of its ancestors.

    `parent` is the index of the segment it continues, -1 for a root. A group is a prompt segment with G children.

    >>> prompt, response = Segment(start=0, length=6, parent=-1), Segment(start=6, length=3, parent=0)
    >>> response.stop
    9
    """

    start: int
    length: int
    parent: int

    @property
    def stop(self) -> int:
        """Return one past the last packed position."""
        return self.start + self.length


@dataclass(frozen=True)
class PackedPictures:
    """The pictures of packed tokens, and which of the tokens stand for them.

    Two pictures, of two tokens and of one:

    >>> import torch
    >>> first, second = Picture("ab", (32, 16), data=b"..."), Picture("cd", (16, 16), data=b"...")
    >>> packed = PackedPictures((first, second), lengths=(2, 1), places_I=torch.tensor([1, 2, 7]))
    >>> packed.num_tokens
    3
    """

    pictures: tuple[Picture, ...]
    """In the order of their places. One that two prompts do not share comes twice."""
    lengths: tuple[int, ...]
    """Tokens of each picture."""
    places_I: torch.Tensor
    """(I,) Packed positions of those tokens, ascending."""
    rows_I: torch.Tensor | None = None
    """(I,) Which of the pictures' tokens these are, counted through all pictures; None for all of them. A slice of the
    packed tokens may begin or end within a picture."""

    @property
    def num_tokens(self) -> int:
        """Return I, the number of tokens that stand for pictures."""
        return sum(self.lengths) if self.rows_I is None else len(self.rows_I)


PER_TARGET = (
    *("predictor_M", "target_M", "sequence_M", "old_logprobs_M", "reference_logprobs_M", "sampler_logprobs_M"),
    "advantages_M",
)
"""Fields of a batch with a value for each response token."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch without padding: N packed input tokens, M response tokens to score, B sequences.

    Response token m is predicted from packed position `predictor_M[m]`: the previous response token, or, for the first,
    the last token of the prompt, which all responses of the group share. The last token of a response predicts
    nothing and is therefore not among the inputs.

    A prompt `5 6` with responses `7 1` and `8 9 1` packs into the inputs `5 6 | 7 | 8 9`:

    >>> import torch
    >>> batch = PackedBatch(
    ...     token_ids_N=torch.tensor([5, 6, 7, 8, 9]), position_ids_N=torch.tensor([0, 1, 2, 2, 3]),
    ...     segments=(Segment(0, 2, -1), Segment(2, 1, 0), Segment(3, 2, 0)),
    ...     predictor_M=torch.tensor([1, 2, 1, 3, 4]), target_M=torch.tensor([7, 1, 8, 9, 1]),
    ...     sequence_M=torch.tensor([0, 0, 1, 1, 1]), advantages_B=torch.tensor([0.7, -0.7]),
    ...     weights_B=torch.tensor([1 / 4, 1 / 6]), old_logprobs_M=torch.zeros(5), sequence_ids=(0, 1))
    >>> batch.num_tokens, batch.num_targets, batch.num_sequences
    (5, 5, 2)
    """

    token_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    """(N,), or (3, N) where the model's rotary embedding has three positions a token and a prompt shows a picture."""
    segments: tuple[Segment, ...]
    predictor_M: torch.Tensor
    target_M: torch.Tensor
    sequence_M: torch.Tensor
    """Which of the B sequences each response token belongs to; ascending."""
    advantages_B: torch.Tensor
    weights_B: torch.Tensor
    """Weight of each token of a sequence in the loss, the normalizer of the whole mini-batch included."""
    old_logprobs_M: torch.Tensor
    """log pi_old of each response token, float32."""
    sequence_ids: tuple[int, ...]
    """Position of each sequence in the mini-batch it came from, so that results find their way back."""
    reference_logprobs_M: torch.Tensor | None = None
    """log pi_ref of each response token, float32; None without a reference policy."""
    experts_Nlk: torch.Tensor | None = None
    """The experts to send each input token to, uint8 or int16; None for those the live routers choose."""
    sampler_logprobs_M: torch.Tensor | None = None
    """log mu of each response token, float32, under the distribution it was drawn from; None where it is log pi_old."""
    pictures: PackedPictures | None = None
    """What the prompts show; None where they are all text."""
    advantages_M: torch.Tensor | None = None
    """Advantage of each response token, float64, where turns of an episode have their own; None where all tokens of a
    sequence have that of `advantages_B`."""

    @property
    def token_advantages_M(self) -> torch.Tensor:
        """Return the advantage of each response token."""
        return self.advantages_B[self.sequence_M] if self.advantages_M is None else self.advantages_M

    @property
    def num_tokens(self) -> int:
        """Return N, the number of input tokens."""
        return int(self.token_ids_N.numel())

    @property
    def num_targets(self) -> int:
        """Return M, the number of response tokens."""
        return int(self.target_M.numel())

    @property
    def num_sequences(self) -> int:
        """Return B, the number of sequences."""
        return int(self.advantages_B.numel())
