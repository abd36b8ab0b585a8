"""What a step minimises: the model's loss terms, weighted and divided by counts of the whole step.

A micro-batch knows how much it holds of everything that is averaged (targets, CTC labels, known tags) before it is run.
The loop adds these counts up over all micro-batches and ranks and hands the totals in, so the sum of all micro-batch
losses is the mean over the step, whatever the split.

D samples, N recordings, M targets, B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.data.batch import Batch, SampleInfo
from osum_echat.dialogue.layout import IGNORE
from osum_echat.dialogue.packing import PackedRows
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.model.ctc import Transcripts
from osum_echat.model.echat import EChatModel
from osum_echat.model.plan import Plan
from osum_echat.training.config import LossConfig


@dataclass
class MicroBatch:
    """A batch ready for the objective: what the device needs is there or on its way, what the program asks is on the
    host.

    Attributes:
        batch: its features on the device, its rows on the host.
        plan: the rows for the LLM, on the device, and all lengths.
        weights_D: weight of each sample's targets.
        transcripts: text ids of each recording (with a CTC head), else None.
        tags: label of each recording for each tag head (with tag heads), else None.
        counts: what this micro-batch adds to each total, by name.
    """

    batch: Batch
    plan: Plan
    weights_D: Tensor
    transcripts: Transcripts | None = None
    tags: dict[str, Tensor] | None = None
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def targets(self) -> list[int]:
        """Of each sample."""
        found = self.plan.rows.targets
        return found + [0] * (len(self.batch) - len(found))


@dataclass
class Outcome:
    """Of one micro-batch.

    Attributes:
        loss: its share of the step's loss, with gradients.
        nll_D: summed negative log-likelihood of each sample, without gradients.
        parts: the sums that belong to ``counts`` (lm weighted), without gradients.
    """

    loss: Tensor
    nll_D: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """Model and loss in one module, which is what engines distribute.

    Args:
        run_all_parts: run every part for every batch, needed or not: ranks that share parameters must make the same
            calls, and a batch of one rank may have no recording or no speech while another's has.
    """

    def __init__(self, model: EChatModel, config: LossConfig, run_all_parts: bool = False):
        super().__init__()
        self.model = model
        self.config = config
        self.run_all_parts = run_all_parts

    @property
    def names(self) -> list[str]:
        """The averaged quantities, in a fixed order."""
        ctc = ["ctc"] if self.model.ctc is not None and self.config.ctc > 0 else []
        tags = [f"tag.{name}" for name in self.model.config.adapter.tags] if self.config.tags > 0 else []
        return ["lm", *ctc, *tags]

    def prepare(self, batch: Batch, device: torch.device, input_noise: float = 0.0) -> MicroBatch:
        """Labels for the extra heads, weights and counts; tensors go to ``device``."""
        weights_D = torch.tensor([self.config.stream.get(sample.stream, 1.0) for sample in batch.samples])
        if input_noise > 0:
            batch = replace(batch, rows=add_input_noise(batch.rows, self.model.vocabulary, input_noise))
        plan = self.model.plan(batch.rows, batch.feats_lengths_N.tolist())
        targets = plan.rows.targets
        counts = {"lm": sum(weight * count for weight, count in zip(weights_D.tolist(), targets, strict=False))}
        transcripts, tags = None, None
        if "ctc" in self.names:
            positions = plan.recordings.adapter.lengths if plan.recordings is not None else []
            transcripts = Transcripts.of(batch.transcripts(), positions)
            counts["ctc"] = float(sum(transcripts.labels))
            transcripts = transcripts.to(device)
        if self.config.tags > 0 and self.model.config.adapter.tags:
            tags = recording_tags(batch, self.model.config.adapter.tags)
            counts |= {f"tag.{name}": float((labels != IGNORE).sum()) for name, labels in tags.items()}
            tags = {name: devices.send(labels, device) for name, labels in tags.items()}
        weights_D = devices.send(weights_D, device)
        return MicroBatch(batch.with_features(device), plan.to(device), weights_D, transcripts, tags, counts)

    def forward(self, micro: MicroBatch, totals: dict[str, float]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The fields of an `Outcome`, as a tuple: engines hang their hooks on the tensors of tuples. ``totals``: counts
        of the step."""
        batch = micro.batch
        parts = self.model(
            batch.rows,
            batch.feats_NTF,
            batch.feats_lengths_N,
            transcripts=micro.transcripts,
            tags=micro.tags,
            weights_D=micro.weights_D,
            run_all_parts=self.run_all_parts,
            language=self.config.lm > 0,
            plan=micro.plan,
        )
        samples = len(micro.weights_D)
        # One entry more than samples: a placeholder may hold none.
        nll_D = parts.nll_M.new_zeros(samples + 1).index_add(0, parts.documents_M, parts.nll_M)[:samples]
        sums = {"lm": (nll_D * micro.weights_D).sum()}
        if "ctc" in self.names:
            sums["ctc"] = parts.ctc_nll_N.sum()
        for name, nll_N in parts.tag_nll_N.items():
            sums[f"tag.{name}"] = nll_N.sum()
        # Nothing may fall out of the graph on one rank alone, so empty sums take part too.
        loss = sum(
            (self._weight(name) / max(totals.get(name, 0.0), 1.0) * value for name, value in sums.items()), nll_D.new_zeros(())
        )
        return loss, nll_D.detach(), {name: value.detach() for name, value in sums.items()}

    def weights_read_directly(self) -> list[nn.Parameter]:
        """Parameters that the model reads other than by calling their module: heads (in the chunked loss) and the token
        table."""
        lm = self.model.lm
        modules = (lm.text_head, lm.speech_head, lm.llm.get_input_embeddings())
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    def _weight(self, name: str) -> float:
        return {"lm": self.config.lm, "ctc": self.config.ctc}.get(name, self.config.tags)


def recording_tags(batch: Batch, classes: dict[str, list[str]]) -> dict[str, Tensor]:
    """Label numbers for each recording [N]: a sample's tags belong to its last recording, earlier turns have none."""
    last_D = batch.last_recording()
    out = {}
    for name, labels in classes.items():
        ids_D = batch.tag_ids(name, labels)
        out[name] = torch.full((len(batch.feats_lengths_N),), IGNORE, dtype=torch.long)
        has = last_D >= 0
        out[name][last_D[has]] = ids_D[has]
    return out


def add_input_noise(rows: PackedRows, vocabulary: Vocabulary, share: float) -> PackedRows:
    """Rows with ``share`` of the speech codes in the inputs replaced by random ones; targets stay.

    A model that is fed its own, imperfect codes at inference should have seen imperfect ones. Draws from torch's global
    generator.
    """
    ids_BT = rows.ids_BT
    is_code_BT = (ids_BT >= vocabulary.text_size) & (ids_BT < vocabulary.speech_delimiter)
    hit_BT = is_code_BT & (torch.rand(ids_BT.shape) < share)
    random_BT = torch.randint_like(ids_BT, vocabulary.text_size, vocabulary.speech_delimiter)
    return replace(rows, ids_BT=torch.where(hit_BT, random_BT, ids_BT))


def placeholder(num_mels: int) -> Batch:
    """A batch without any target: what a rank runs when others still have data and it has none."""
    zeros = torch.zeros(1, 2, dtype=torch.long)
    rows = PackedRows(
        ids_BT=zeros,
        positions_BT=torch.arange(2)[None],
        documents_BT=zeros.clone(),
        visible_BT=torch.ones(1, 2, dtype=torch.bool),
        targets_BT=torch.full((1, 2), IGNORE),
        text_softmax_BT=torch.ones(1, 2, dtype=torch.bool),
        audio_index_BT=torch.full((1, 2), -1),
    )
    none = torch.zeros(0, dtype=torch.long)
    return Batch(rows, torch.zeros(0, 0, num_mels), none, [SampleInfo()])
