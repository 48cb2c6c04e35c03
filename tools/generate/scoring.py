"""The work of mp-score: files of documents and of questions through the engine."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megapatch.tools.generate import held_out, questions
from megapatch.tools.generate.likelihood import Scored, score
from megapatch.tools.generate.progress import Progress, most_tokens
from megapatch.tools.generate.prompts import Reader

Row = dict[str, Any]


class Scorer:
    """Scores files with one engine; ``samples`` takes a row for each document and question."""

    def __init__(
        self,
        engine: Any,
        reader: Reader,
        match: questions.Match,
        samples: Callable[[Row], None] | None,
        tells: bool,
    ) -> None:
        """``tells``: whether this process shows progress."""
        self.engine, self.reader, self.match, self.tells = engine, reader, match, tells
        self._samples = samples or (lambda row: None)

    def score(self, file: held_out.File | questions.File) -> Iterator[Row]:
        """The results of a file."""
        if isinstance(file, held_out.File):
            yield self._perplexity(file)
        else:
            yield from self._answers(file)

    def _scored(self, pairs: Any, most: Sequence[int], what: str) -> Iterator[tuple[int, Scored]]:
        with self._progress(most, what) as progress:
            yield from score(self.engine, pairs, progress.done)

    def _progress(self, most: Sequence[int], what: str) -> Progress:
        progress = Progress(most, what, quiet=not self.tells)
        self.engine.on_step = progress.following(self.engine.statistics)
        return progress

    def _perplexity(self, file: held_out.File) -> Row:
        windows = list(file.how.windows(file.lengths))
        most = [window.stop - window.start - 1 for window in windows]
        pairs = held_out.pairs(file.documents, windows, file.how, file.vocab_size)
        totals = [0.0] * len(windows)
        for number, scored in self._scored(pairs, most, "windows"):
            totals[number] = scored.total
        logprobs = [0.0] * len(file.documents)
        for window, total in zip(windows, totals, strict=True):  # in this order, so that the sum is always the same
            logprobs[window.document] += total
        for number, (length, logprob) in enumerate(zip(file.lengths, logprobs, strict=True)):
            self._samples({"data": file.name, "index": number, "tokens": length - 1, "logprob": logprob})
        return held_out.result(file.name, file.documents, logprobs, file.how)

    def _answers(self, file: questions.File) -> list[Row]:
        rows: dict[int, Row] = self._choices(file) | self._matches(file)
        ordered = [{"data": file.name, **rows[number]} for number in sorted(rows)]
        for row in ordered:
            self._samples(row)
        return questions.results(file.name, ordered)

    def _choices(self, file: questions.File) -> dict[int, Row]:
        asked = {number: questions.pairs(one, self.reader) for number, one in enumerate(file.questions) if one.choices}
        flat = [(number, pair) for number, pairs in asked.items() for pair in pairs]
        if not flat:
            return {}
        most = [len(pair.context) + len(pair.target) - 1 for _, pair in flat]
        found: dict[int, Scored] = dict(self._scored((pair for _, pair in flat), most, "choices"))
        each: dict[int, list[Scored]] = {number: [] for number in asked}
        for at, (number, _) in enumerate(flat):
            each[number].append(found[at])
        return {number: questions.choose(file.questions[number], scored) for number, scored in each.items()}

    def _matches(self, file: questions.File) -> dict[int, Row]:
        asked = [(number, one.request) for number, one in enumerate(file.questions) if one.request is not None]
        if not asked:
            return {}
        rows = {}
        with self._progress([most_tokens(request) for _, request in asked], "answers") as progress:
            for completion in self.engine.run(request for _, request in asked):
                progress.done(completion)
                number = asked[completion.number][0]
                rows[number] = self.match.row(file.questions[number], completion.text)
        return rows
