"""What the trials of a sweep make shards do, counted from shapes: floating-point operations, and bytes between shards.

Counted is what the code does. Once for all: the dense pass, once per calibration set; masks, and the evaluation of the
model that is only pruned, once per mask; errors before recovery on dense streams, once per mask, granularity and loss;
the perplexity of the dense model. What is shared is on the account of the first trial that asks for it. A kept text
enters the first pruned block without passing through those before. Boundaries between blocks that are not kept, and
statistics that are not, are made again for every use.

FLOPs are of matrix products, of attention (all pairs of tokens, as `reconstruction.flops` counts it) and of what is
done on Gram matrices; what goes by elements (scores, norms, optimizers) is left out. Which linears share their input
is guessed from their names (q, k and v; gate and up): another family's Gram matrices may come out too many.
Bytes over the network are those of hidden states and their gradients between shards; what is small (calls, rows,
losses, token ids) is left out. Trials that a scheduler stops early count in full. No torch.
"""

# C, V tokens of calibration and validation, E of all evaluation texts; O outputs, I inputs of a linear

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raysweep.config.spellings import window_length
from raysweep.config.trial import Trial
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import ANEW, Placement
from raysweep.shards.memory import SIZES, units_in
from raysweep.shards.trial import DENSE_KEY, pruned_key

Kind = tuple[str, str | None]
"""Recovery and granularity of trials."""

DENSE_PASS: Kind = ("dense pass", None)
BLOCKS, HEAD, WORKERS = (
    "blocks",
    "head",
    "workers",
)  # where work is done: in every block, in the head, by retraining
STATISTICS, FORWARD, LOSSES, GRAM_ERRORS, FACTORS, SOLVING = (
    "statistics",
    "forward",
    "losses",
    "gram errors",
    "factors",
    "solving",
)
SOLVER_ITERATIONS = 30
"""Of exact recovery, mean over matrices: measured on the embedded model, wanda 0.6, where it is 23 to 35."""
ALONE, IMPORT = "forward alone", "import"  # a pass beside no other shard; a process that imports torch


@dataclass(frozen=True)
class Text:
    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


@dataclass(frozen=True)
class Asked:
    """A trial that is to run. kind: under which it is counted;  data: of one that is retrained, what on"""

    trial: Trial
    kind: Kind
    data: Text | None = None

    @classmethod
    def of(cls, trial: Trial, data: Text | None = None) -> Asked:
        return cls(trial, (trial.recovery, trial.granularity), data)


@dataclass(frozen=True)
class PhaseWork:
    """Trials that share a calibration set, in the order in which they run, and the texts of their phase.

    known: keys of models (DENSE_KEY, `pruned_key`) whose perplexities earlier launches have found
    """

    calibration: Text
    validation: Text | None
    evaluation: tuple[Text, ...]
    trials: tuple[Asked, ...]
    known: frozenset[str] = frozenset()

    @property
    def kept(self) -> int:
        """C + V"""
        return self.calibration.tokens + (0 if self.validation is None else self.validation.tokens)

    @property
    def kept_texts(self) -> int:
        return 1 if self.validation is None else 2

    @property
    def measured(self) -> int:
        """V + E: tokens that go on to the losses."""
        return self.kept - self.calibration.tokens + self.evaluated

    @property
    def evaluated(self) -> int:
        return sum(text.tokens for text in self.evaluation)


@dataclass(frozen=True)
class Piece:
    """Some work of one trial.

    rate: what a unit of it takes, by the name under which the probe finds it out
    amount: in what the rate counts (tokens, steps, or times), in every block or in the head
    flops: of all blocks;  network: bytes between shards
    trial: its place among those that run, -1 for the dense pass;  in_turn: whether one shard at a time works on it
    """

    kind: Kind
    trial: int
    rate: str
    amount: float
    flops: float = 0.0
    place: str = BLOCKS
    network: float = 0.0
    in_turn: bool = False


@dataclass(frozen=True)
class Work:
    """samples: by the name of a rate, a trial whose steps, masks or solutions are those that it is about
    phases, trials: that have work, and that run;  retrains: whether shards end and come up again in between
    """

    pieces: tuple[Piece, ...]
    samples: dict[str, Trial]
    phases: int
    trials: int
    retrains: bool = False

    @property
    def flops(self) -> float:
        return sum(piece.flops for piece in self.pieces)

    @property
    def network(self) -> float:
        return sum(piece.network for piece in self.pieces)

    def flops_of(self, kind: Kind) -> float:
        return sum(piece.flops for piece in self.pieces if piece.kind == kind)


def count_work(
    model: ModelShape,
    dtype: str,
    ranges: Sequence[tuple[int, int]],
    heads: int,
    phases: Sequence[PhaseWork],
    placement: Placement | None = None,
) -> Work:
    """All that is done for the trials of all phases in one group of shards. heads: how many shards have it"""
    placement = placement or Placement()
    samples: dict[str, Trial] = {}
    pieces: list[Piece] = []
    first = 0
    for phase in phases:
        if phase.trials:
            counting = _Counting(model, SIZES[dtype], ranges, heads, phase, first, samples, placement)
            pieces += counting.pieces()
            first += len(phase.trials)
    retrains = any(asked.data is not None for phase in phases for asked in phase.trials)
    return Work(tuple(pieces), samples, sum(bool(phase.trials) for phase in phases), first, retrains)


def retraining_flops(model: ModelShape, tokens: float) -> float:
    """Of training the whole model on so many tokens: six a parameter, the head's included (arXiv 2001.08361)."""
    parameters = sum(block.parameters for block in model.blocks) + model.vocabulary * model.hidden
    return 6.0 * parameters * tokens


def step_rate(trial: Trial) -> str:
    """The name of what a step of a block takes. Windows and the whole model take one for each of their blocks."""
    granularity = trial.granularity if trial.granularity in ("matrix", "subblock") else "block"
    if granularity == "matrix" and trial.loss == "mse":
        granularity = "matrix, dense" if trial.input_stream == "dense" else "matrix, stream"
    clipped = "clipped" if trial.max_grad_norm is not None else ""
    loss = "mse" if trial.recovery == "retrain" else trial.loss
    trained = "all" if trial.trainable == "blocks" else trial.trainable
    words = (granularity, loss, trained, trial.optimizer, clipped, f"batch {trial.batch_size}")
    return "step: " + " ".join(str(word) for word in words if word)


def mask_rate(trial: Trial) -> str:
    """The name of what the masks of a block take."""
    known = str(trial.criterion) in ("magnitude", "random", "wanda", "ria", "sparsegpt")
    pattern = "N:M" if trial.group_size is not None else "unstructured"
    return f"mask: {trial.criterion if known else 'wanda'} {pattern} {trial.comparison_group or ''}".rstrip()


@dataclass
class _Counting:
    """One phase. `made`: what trials share and one of them has made."""

    model: ModelShape
    size: int
    ranges: Sequence[tuple[int, int]]
    heads: int
    phase: PhaseWork
    first: int
    samples: dict[str, Trial]
    placement: Placement
    made: set[object] = field(default_factory=set)
    found: list[Piece] = field(default_factory=list)
    kind: Kind = DENSE_PASS
    trial: int = -1

    def pieces(self) -> list[Piece]:
        calibration = self.phase.calibration.tokens
        matrices = any(asked.trial.granularity == "matrix" for asked in self.phase.trials)
        once_more = any(asked.data is not None for asked in self.phase.trials)  # for what was retrained
        for _ in range(1 + once_more):
            for place, text in enumerate(self._kept_texts()):
                sums_up = (place == 0 or matrices) and not self._is_anew
                flops = self._forward_flops([text]) + sums_up * self._gram_flops(text.tokens)
                rate = STATISTICS if sums_up else FORWARD
                self._add(rate, text.tokens, flops, network=self._hop(text.tokens))
        for number, asked in enumerate(self.phase.trials):
            trial, self.kind, self.trial = asked.trial, asked.kind, self.first + number
            if trial.is_dense:
                self._dense_model()
            elif trial.is_pruned_only:
                self._masks(trial)
                self._pruned_model(trial)
            elif trial.recovery == "retrain":
                self._retrained(trial, asked.data or self.phase.calibration)
            else:
                self._recovery(trial, self._masks(trial))
                self._evaluation(calibration)
                if trial.statistics_stream == "recovered":
                    self._evaluation_before()
                else:
                    self._pruned_model(trial)
            self._dense_model()
        return self.found

    # What trials share

    def _is_new(self, *key: object) -> bool:
        new = key not in self.made
        self.made.add(key)
        return new

    def _dense_model(self) -> None:
        if DENSE_KEY in self.phase.known or not self._is_new(DENSE_KEY):
            return
        flops = self._forward_flops(self.phase.evaluation)
        self._add(FORWARD, self.phase.evaluated, flops, network=self._hop(self.phase.evaluated))
        self._losses(self.phase.measured)

    def _masks(self, trial: Trial) -> bool:
        """Of masks that depend on no recovery; with the rows of their linears. Whether they are made now."""
        if trial.statistics_stream == "recovered" or not self._is_new("masks", pruned_key(trial)):
            return False
        calibration = self.phase.calibration
        if trial.statistics_stream == "pruned":
            flops = self._forward_flops([calibration])
            gram = self._gram_flops(calibration.tokens)
            self._add(STATISTICS, calibration.tokens, flops + gram, in_turn=True)
            self._add(FORWARD, calibration.tokens, flops, network=self._hop(calibration.tokens), in_turn=True)
        self._make_masks(trial, in_turn=trial.statistics_stream == "pruned")
        self._statistics_again([calibration], in_turn=trial.statistics_stream == "pruned")
        if self._is_new("powers"):
            self._gram_errors()
        self._gram_errors()
        return True

    def _make_masks(self, trial: Trial, in_turn: bool) -> None:
        rate = mask_rate(trial)
        self.samples.setdefault(rate, trial)
        if trial.criterion == "sparsegpt":
            shared = trial.statistics_stream == "dense"
            if not shared or self._is_new("factor", trial.dampening):
                self.samples.setdefault(FACTORS, trial)
                flops = sum(4 / 3 * inputs**3 for block in self.model.blocks for inputs, _ in block.grams)
                self._add(FACTORS, 1, flops, in_turn=in_turn)
        products = sum(o * i**2 for o, i in self._shapes) if trial.criterion == "sparsegpt" else 0
        self._add(rate, 1, float(products), in_turn=in_turn)

    def _pruned_model(self, trial: Trial) -> None:
        key = pruned_key(trial)
        if key not in self.phase.known and self._is_new("pruned", key):
            self._masks(trial)
            self._evaluation(self.phase.calibration.tokens)

    # What a trial does itself

    def _recovery(self, trial: Trial, made_masks: bool) -> None:
        """made_masks: whether masks are made just before, block by block unless trials are in turn: then the statistics
        of the calibration set are there"""
        phase, in_turn = self.phase, trial.is_sequential
        unseen = self._kept_texts()[1:] if made_masks and not in_turn else self._kept_texts()
        if trial.is_sequential:
            self._add(
                FORWARD,
                phase.kept,
                self._forward_flops(self._kept_texts()),
                BLOCKS,
                self._hop(phase.kept),
                True,
            )
        if trial.statistics_stream == "recovered":
            calibration = [phase.calibration]
            flops = self._forward_flops(calibration)
            gram = self._gram_flops(phase.calibration.tokens)
            self._add(STATISTICS, phase.calibration.tokens, flops + gram, in_turn=True)
            self._make_masks(trial, in_turn=True)
            self._statistics_again([phase.calibration], in_turn=True)
            self._gram_errors(in_turn=True)
            if self._span(trial) > 1:
                self._add(FORWARD, phase.calibration.tokens, flops, in_turn=True)
        if trial.granularity == "matrix":
            self._matrices(trial, unseen)
        else:
            self._modules(trial, in_turn or self._crosses(trial), unseen)

    def _modules(self, trial: Trial, in_turn: bool, unseen: Sequence[Text]) -> None:
        """Errors before and after, targets of their own, and steps. unseen: without statistics just made"""
        kept, crossed = self.phase.kept, self._crossed(trial)
        shared = not trial.is_sequential and not crossed
        passes = 1 + (not shared or self._is_new("error", pruned_key(trial), trial.granularity, trial.loss))
        passes += trial.target_stream == "pruned"
        between = passes * kept * self.model.hidden * self.size * crossed
        flops = passes * self._forward_flops(self._kept_texts())
        self._add(FORWARD, passes * kept, flops, network=between, in_turn=in_turn)
        self._boundaries_again(unseen if self._is_anew else self._kept_texts(), in_turn)
        if trial.granularity == "subblock":
            self._halves_again(in_turn)
        self._steps(trial, in_turn)
        if self._is_new("profile", step_rate(trial)):
            self._add(step_rate(trial), 3, 0.0, in_turn=in_turn)  # takes about as long, once for all trials

    def _steps(self, trial: Trial, in_turn: bool) -> None:
        rate, text = step_rate(trial), self.phase.calibration
        self.samples.setdefault(rate, trial)
        epochs, batch = trial.epochs or 1, trial.batch_size or 1
        steps, tokens = epochs * -(-text.samples // batch), epochs * text.tokens
        crossing = 2.0 * tokens * self.model.hidden * self.size * self._crossed(trial)
        flops = tokens * sum(
            step_flops(block, self._attention, text.length, trial) for block in self.model.blocks
        )
        within = [block for index, block in enumerate(self.model.blocks) if index % self._span(trial)]
        flops += tokens * sum(2.0 * _size(block, leading(block)[0]) for block in within)
        self._add(rate, steps, flops, network=crossing, in_turn=in_turn)
        self._add(f"open {rate}", 1, in_turn=in_turn)

    def _matrices(self, trial: Trial, unseen: Sequence[Text]) -> None:
        phase, in_turn, on_gram = self.phase, trial.is_sequential, self._goes_by_gram(trial)
        streams = trial.input_stream == "pruned"
        if streams:
            groups = max(len(block.grams) for block in self.model.blocks)
            flops = groups * self._forward_flops(self._kept_texts())
            self._add(FORWARD, groups * phase.kept, flops, in_turn=in_turn)
        needs_dense = not streams or trial.target_stream == "dense"
        reads_tokens = trial.optimizer != "exact" or streams
        for text in self._kept_texts()[: None if streams or not on_gram else 1]:
            if needs_dense and reads_tokens and self._is_new("inputs", text):
                self._add(FORWARD, text.tokens, self._forward_flops([text]), in_turn=in_turn)
                if not (self._is_anew and on_gram):  # else they are made for statistics
                    self._boundaries_again([text], in_turn)
        before = in_turn or self._is_new("error", pruned_key(trial), "matrix", trial.loss, trial.optimizer)
        if on_gram:
            self._statistics_again(unseen, in_turn)
            for _ in range(phase.kept_texts * (1 + before)):
                self._gram_errors(in_turn)
        else:
            passes = 2 * (1 + before)
            products = passes * phase.kept + phase.calibration.tokens
            self._add(FORWARD, products, 2.0 * products * self._weights, in_turn=in_turn)
        if trial.optimizer == "exact":
            if streams:
                self._add(STATISTICS, 2 * phase.kept, self._gram_flops(3 * phase.kept), in_turn=in_turn)
            self.samples.setdefault(SOLVING, trial)
            products = SOLVER_ITERATIONS + 1
            self._add(
                SOLVING,
                SOLVER_ITERATIONS,
                2.0 * products * sum(o * i**2 for o, i in self._shapes),
                in_turn=in_turn,
            )
        else:
            self._steps(trial, in_turn)

    def _evaluation(self, calibration: int) -> None:
        """Of weights of their own on all texts. calibration: tokens of it, which are only compared"""
        texts = [*self._kept_texts(), *self.phase.evaluation]
        tokens = calibration + self.phase.measured
        self._add(FORWARD, tokens, self._forward_flops(texts), network=self._hop(tokens))
        self._boundaries_again(self._kept_texts())
        self._losses(self.phase.measured)

    def _evaluation_before(self) -> None:
        """Of masks that no other trial has: on the first text."""
        first = self.phase.evaluation[0]
        self._add(FORWARD, first.tokens, self._forward_flops([first]), network=self._hop(first.tokens))
        self._losses(first.tokens)

    def _losses(self, tokens: int) -> None:
        back = tokens * self.model.hidden * self.size * (1 - 1 / self.heads) * (len(self.ranges) > 1)
        self._add(LOSSES, tokens, 2.0 * tokens * self.model.vocabulary * self.model.hidden, HEAD, back)

    def _retrained(self, trial: Trial, data: Text) -> None:
        self._masks(trial)
        start = trial.start
        if start is not None and self._is_new("start", start):
            self._recovery(start, self._masks(start))
        tokens = (trial.epochs or 1) * data.tokens
        flops = retraining_flops(self.model, tokens)
        if trial.loss == "distillation":
            flops *= 4 / 3  # the teacher's forward pass
        self.samples.setdefault(step_rate(trial), trial)
        self._add(step_rate(trial), tokens / data.length / (trial.batch_size or 1), flops, WORKERS)
        self._evaluation(self.phase.calibration.tokens)
        self._pruned_model(trial)

    # Their parts

    def _add(
        self,
        rate: str,
        amount: float,
        flops: float = 0.0,
        place: str = BLOCKS,
        network: float = 0.0,
        in_turn: bool = False,
    ) -> None:
        self.found.append(Piece(self.kind, self.trial, rate, amount, flops, place, network, in_turn))

    def _gram_errors(self, in_turn: bool = False) -> None:
        """The error of every linear's output from its Gram matrix, on one text; float64."""
        self._add(GRAM_ERRORS, 1, 2.0 * sum(o * i**2 for o, i in self._shapes), in_turn=in_turn)

    def _goes_by_gram(self, trial: Trial) -> bool:
        return trial.optimizer == "exact" or (trial.input_stream == "dense" and trial.loss == "mse")

    def _kept_texts(self) -> list[Text]:
        return [self.phase.calibration, *([] if self.phase.validation is None else [self.phase.validation])]

    @property
    def _is_anew(self) -> bool:
        return self.placement.statistics == ANEW

    def _statistics_again(self, texts: Sequence[Text], in_turn: bool) -> None:
        """Of dense streams, where they are not kept."""
        if self._is_anew:
            tokens = sum(text.tokens for text in texts)
            flops = self._forward_flops(texts) + self._gram_flops(tokens)
            self._add(STATISTICS, tokens, flops, in_turn=in_turn)
            self._boundaries_again(texts, in_turn)

    def _boundaries_again(self, texts: Sequence[Text], in_turn: bool = False) -> None:
        """Between blocks, those that are not kept."""
        self._pass_again(texts, self._made_share, in_turn)

    def _halves_again(self, in_turn: bool) -> None:
        """What attention gives, beside the boundaries between blocks: before those that are kept."""
        if self.placement.every > 1 or not self.placement.halves:
            halves = [units_in(block, "subblock")[0] for block in self.model.blocks]
            attention = sum(map(_size, self.model.blocks, halves)) / self._weights
            self._pass_again(self._kept_texts(), attention * (1 - self._made_share), in_turn)

    def _pass_again(self, texts: Sequence[Text], share: float, in_turn: bool) -> None:
        """Through that share of all blocks."""
        if share:
            tokens = share * sum(text.tokens for text in texts)
            self._add(FORWARD, tokens, share * self._forward_flops(texts), in_turn=in_turn)

    @cached_property
    def _made_share(self) -> float:
        """Of the boundaries behind blocks, those that are not kept."""
        places = [place for start, stop in self.ranges for place in range(1, stop - start + 1)]
        return sum(place % self.placement.every > 0 for place in places) / len(places)

    def _gram_flops(self, tokens: float) -> float:
        """Of the Gram matrices of so many tokens."""
        return tokens * sum(2.0 * i**2 * share for block in self.model.blocks for i, share in block.grams)

    def _forward_flops(self, texts: Iterable[Text]) -> float:
        """Of a pass through all blocks."""
        pairs = 4.0 * self._attention * len(self.model.blocks)
        return sum(text.tokens * (2.0 * self._weights + pairs * text.length) for text in texts)

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        return list(self.model.linears.values())

    @cached_property
    def _weights(self) -> float:
        """That a token passes through in all blocks."""
        return sum(
            o * i * block.share(name) for block in self.model.blocks for name, (o, i) in block.linears.items()
        )

    @property
    def _attention(self) -> int:
        return self.model.attention or self.model.hidden

    def _hop(self, tokens: float) -> float:
        """Bytes of hidden states that pass along the chain."""
        return tokens * self.model.hidden * self.size * (len(self.ranges) - 1)

    def _span(self, trial: Trial) -> int:
        """How many blocks the trial trains together."""
        blocks = len(self.model.blocks)
        return blocks if trial.granularity == "model" else window_length(str(trial.granularity)) or 1

    def _crossed(self, trial: Trial) -> int:
        """Ends of shards that lie within a unit."""
        return sum(start % self._span(trial) > 0 for start, _ in self.ranges[1:])

    def _crosses(self, trial: Trial) -> bool:
        return self._crossed(trial) > 0


def step_flops(block: BlockShape, attention: int, length: int, trial: Trial) -> float:
    """Of a step on a block, a token: forward and backward, without the pass back to what the unit takes in."""
    weights = _size(block, block.linears)
    if trial.granularity == "matrix":
        return 4.0 * weights
    first = leading(block)[: 2 if trial.granularity == "subblock" else 1]
    spared = sum(_size(block, names) for names in first)
    return 6.0 * weights - 2.0 * spared + 14.0 * attention * length


def _size(block: BlockShape, names: Iterable[str]) -> float:
    """Weights of linears, those of experts by the share of tokens that they see."""
    return sum(block.linears[name][0] * block.linears[name][1] * block.share(name) for name in names)


def leading(block: BlockShape) -> tuple[list[str], list[str]]:
    """Linears behind the norm that attention begins with, and behind that of the MLP."""
    groups = block.input_groups
    attention = [names for names in groups if "attn" in names[0] or "attention" in names[0]] or groups[:1]
    others = [names for names in groups if names not in attention and names[0] not in block.routed]
    return attention[0], others[0] if others else []
