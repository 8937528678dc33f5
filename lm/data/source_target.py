"""SourceTargetData: texts and what they are to become, from a file of two texts a line."""

from functools import cached_property

from lm.bounds import checked
from lm.corpus import columns
from lm.data.chat import note_left_out, note_repeated
from lm.data.tasks import TaskData
from lm.errors import UserError

NAMES = ("source", "target")
END, START = "\x03", "\x02"
"""ASCII's end and start of text. Their ids are 0 and 1, whatever the texts are: Seq2Seq's start_token is 1."""


class SourceTargetData(TaskData):
    """A source and its target a line, tab-separated or as JSON lines: dates to be rewritten, sentences to translate.

    For `lm.models.Seq2Seq`, whose start_token is 1, or a GPT, which reads the source before the same mark. Characters
    are tokens. Lines that are longer than the context are left out, and counted; equal ones count once, and a source
    with two targets is refused.

    Args:
        corpus: dates (generated), or the path of a file: source, a tab, target; or JSON lines with source and target.
        block_size: Tokens in a sequence: source, target and two marks.
        batch_size: Lines per optimizer step, over all processes and accumulated micro-batches.
        held_out: Lines for validation, and as many others for testing; training never draws one of them.
        num_workers: Processes that prepare batches.
        seed: Chooses the training lines; set from seed_everything.
    """

    end = END

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str = "dates",
        block_size: int = 64,
        batch_size: int = 64,
        held_out: int = 500,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(
            block_size=block_size, batch_size=batch_size, held_out=held_out, num_workers=num_workers, seed=seed
        )
        self.corpus = corpus

    @cached_property
    def _rows(self) -> list[columns.Row]:
        rows, repeated = columns.read(self.corpus, NAMES, given=0)
        note_repeated(self, "lines", repeated)
        for row in rows:
            if min(row.first + row.second) <= END:  # one below would come before the marks, and shift their ids
                raise UserError(f"{row.place}: it has a control character, 0 to 3, which are marks here: take it out")
        kept = [row for row in rows if len(row.first) + len(row.second) + 2 <= self.block_size]
        note_left_out(self, "lines", {"train": (len(rows), len(kept))})
        return kept

    @property
    def symbols(self) -> str:
        """The characters of all lines, and the mark before the target."""
        return "".join({character for row in self._rows for text in row[:2] for character in text}) + START

    @property
    def size(self) -> int:
        """The number of different lines."""
        return len(self._rows)

    def example(self, index: int) -> tuple[str, str]:
        """Return the source of a line with the mark after it, and the target."""
        row = self._rows[index]
        return row.first + START, row.second

    def question(self, prompt: str) -> tuple[str, str]:
        """Return a source with an arrow after it, as people see it, and with the mark.

        Raises:
            UserError: It is empty, or longer than the context.
        """
        text = prompt.strip("\r\n")
        if not text.strip() or len(text) + 2 > self.block_size:
            raise UserError(
                f"{prompt[:40]!r} has {len(text)} characters: it takes 1 to {self.block_size - 2}, with its target"
            )
        return f"{text} → ", text + START

    def longest(self) -> tuple[str, str]:
        """Return the longest line."""
        return max(map(self.example, range(self.size)), key=lambda one: len("".join(one)))
