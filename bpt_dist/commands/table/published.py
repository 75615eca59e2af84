"""The published Table 1: its source, its known faults, and averages over columns that all rows share."""

from __future__ import annotations

from dataclasses import dataclass

from bpt_dist.commands.table.layout import MISSING, Block, Sheet, Text

SOURCE = (
    "Table 1 of the thesis defence slides, KAIST, 2023-06-13 (Bayesian Prompt Tuning; in print BMTPT, Lee et al., "
    "Findings of EMNLP 2023), T5-base. Seeds and spread are not stated there; these rows take no part in any test."
)
FAULTY_COLA = (
    "CoLA: BPT, its variants and vanilla transfer PT report accuracy, every other row the Matthews correlation, so "
    "the printed GLUE averages cannot be compared; GLUE-7 leaves CoLA out and can be."
)
FAULTY_WSC = "WSC: 67.3 is 35 of 52 right, the score of the constant majority class; SuperGLUE-4 leaves WSC out."
FAULTY_MULTIRC = "BPT with T5-large: MultiRC is printed as 95.7; the average printed beside it (76.6) implies 75.7, used here."
METHOD_NAMES = {
    "fine_tuning": "Fine-tuning", "adapters": "Adapters", "bitfit": "BitFit", "lora": "LoRA",
    "prompt_tuning": "PT", "vanilla_transfer": "Vanilla transfer PT", "spot": "SPoT", "attempt": "ATTEMPT",
    "mpt": "MPT", "hyperformer": "HyperFormer", "hyperdecoder": "HyperDecoder", "dept": "DePT", "bpt": "BPT",
}  # fmt: skip
"""How print calls our methods, in the order of the published rows; a method that is not here is called by its own name."""
GLUE = ("mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola")
SUPER_GLUE = ("multirc", "boolq", "wic", "wsc", "cb")
HEADER = (
    "Method", "Parameters a task",
    "MNLI (accuracy)", "QQP (accuracy)", "QNLI (accuracy)", "SST-2 (accuracy)", "STS-B (Pearson)", "MRPC (accuracy)",
    "RTE (accuracy)", "CoLA (Matthews)", "CoLA (accuracy)", "GLUE as printed", "GLUE-7", "MultiRC (F1)",
    "BoolQ (accuracy)", "WiC (accuracy)", "WSC (accuracy)", "CB (accuracy)", "SuperGLUE as printed", "SuperGLUE-4",
)  # fmt: skip

# Method | parameters a task | GLUE in the order above, average | SuperGLUE in the order above, average
_SINGLE_TARGET = """
Fine-tuning         | 220M  | 86.8 91.6 93.0 94.6 89.7 90.2 71.9 61.8 84.9 | 72.8 81.1 70.2 59.6 85.7 73.9
Adapters            | 1.9M  | 86.5 90.2 93.2 93.8 90.7 85.3 71.9 64.0 84.5 | 75.9 82.5 67.1 67.3 85.7 75.7
BitFit              | 280K  | 85.3 90.1 93.0 94.2 90.9 86.8 67.6 58.2 83.3 | 74.5 79.6 70.0 59.6 78.6 72.5
PT                  | 76.8K | 81.3 89.7 92.8 90.9 89.5 68.1 54.7 10.6 72.2 | 58.7 61.7 48.9 51.9 67.9 57.8
Vanilla transfer PT | 76.8K | 85.8 86.9 93.2 92.9 90.5 87.1 77.0 83.2 87.1 | 72.2 77.9 65.5 67.3 78.6 72.3
SPoT                | 76.8K | 85.4 90.1 93.0 93.4 90.0 79.7 69.8 57.1 82.3 | 74.0 77.2 67.0 50.0 46.4 62.9
ATTEMPT             | 232K  | 84.3 90.3 93.0 93.2 89.7 85.7 73.4 57.4 83.4 | 74.4 78.8 66.8 53.8 78.6 70.5
MPT                 | 77.6K | 85.9 90.3 93.1 93.8 90.4 89.1 79.4 62.4 85.6 | 74.8 79.6 69.0 67.3 79.8 74.1
BPT                 | 77.6K | 86.2 90.3 93.4 93.7 90.8 87.2 75.5 86.6 88.0 | 72.4 80.3 67.4 67.3 85.7 74.6
"""
_MULTI_TARGET = """
Fine-tuning*  | 28M   | 85.7 91.1 92.0 92.5 88.8 90.2 75.4 54.9 83.8 |
Adapters*     | 1.8M  | 86.3 90.5 93.2 93.0 89.9 90.2 70.3 61.5 84.4 |
HyperFormer*  | 638K  | 85.7 90.0 93.0 94.0 89.7 87.2 75.4 63.7 84.8 |
HyperDecoder* | 1.8M  | 86.0 90.5 93.4 94.0 90.5 87.7 71.7 55.9 83.7 |
ATTEMPT*      | 96K   | 83.8 90.0 93.1 93.7 90.8 86.1 79.9 64.3 85.2 | 74.4 78.3 66.5 69.2 82.1 74.1
MPT*          | 10.5K | 84.3 90.0 93.0 93.3 90.4 89.2 82.7 63.5 85.8 | 74.8 79.2 70.2 67.3 89.3 76.1
BPT*          | 10.5K | 85.9 90.1 92.9 94.6 90.8 89.3 77.1 87.0 88.5 | 72.7 81.0 68.4 67.3 92.9 76.5
"""
_VARIANTS = """
BPT, 10 particles       | 77.6K | 85.7 90.4 93.3 93.8 90.8 90.8 77.0 85.2 88.4 | 72.7 78.9 68.6 67.3 83.1 74.1
BPT, 6 of 12 tasks/step | 77.6K | 85.8 90.3 93.1 93.8 90.9 87.3 78.4 86.9 88.3 | 72.1 80.8 69.6 67.3 84.1 74.8
BPT, T5-large           |       | 89.1 90.9 94.1 95.5 92.3 89.3 76.2 86.6 89.3 | 75.7 84.4 72.4 67.3 83.2 76.6
"""


@dataclass(frozen=True)
class PublishedRow:
    """One printed row in percent: eight GLUE scores and their average, five SuperGLUE scores and theirs."""

    method: str
    parameters: str
    glue: tuple[float, ...]
    glue_average: float
    super_glue: tuple[float, ...]
    super_glue_average: float | None

    @property
    def cola_is_accuracy(self) -> bool:
        """Return whether the CoLA entry is accuracy (else it is the Matthews correlation)."""
        return self.method.startswith(("BPT", "Vanilla transfer PT"))

    @property
    def glue_7(self) -> float:
        """Return the mean over GLUE without CoLA, the only GLUE average that all rows share."""
        return sum(self.glue[:7]) / 7

    @property
    def super_glue_4(self) -> float | None:
        """Return the mean over SuperGLUE without WSC, or None where the row has no SuperGLUE scores."""
        if not self.super_glue:
            return None
        return (sum(self.super_glue) - self.super_glue[3]) / 4


def published_rows() -> dict[str, tuple[PublishedRow, ...]]:
    """Return the printed rows by block."""
    return {
        "Published, one target task": _rows(_SINGLE_TARGET),
        "Published, several target tasks (*)": _rows(_MULTI_TARGET),
        "Published, variants of BPT": _rows(_VARIANTS),
    }


def published_sheet() -> Sheet:
    """Return the published numbers as a sheet of their own: they share no seed, split or test with ours."""
    blocks = tuple(Block(caption, tuple(_texts(row) for row in rows)) for caption, rows in published_rows().items())
    notes = (f"Source: {SOURCE}", FAULTY_COLA, FAULTY_WSC, FAULTY_MULTIRC)
    return Sheet("Published numbers (not from this project), in percent", HEADER, blocks, notes)


def _rows(printed: str) -> tuple[PublishedRow, ...]:
    rows = []
    for line in printed.strip().splitlines():
        method, parameters, glue, super_glue = (part.strip() for part in line.split("|"))
        *glue_scores, glue_average = map(float, glue.split())
        *super_scores, super_average = map(float, super_glue.split()) if super_glue else (None,)
        rows.append(PublishedRow(method, parameters, tuple(glue_scores), glue_average, tuple(super_scores), super_average))
    return tuple(rows)


def _texts(row: PublishedRow) -> tuple[Text, ...]:
    *seven, cola = row.glue
    colas = (None, cola) if row.cola_is_accuracy else (cola, None)
    super_glue = row.super_glue or (None,) * len(SUPER_GLUE)
    averages = (row.super_glue_average, row.super_glue_4)
    numbers = (*seven, *colas, row.glue_average, row.glue_7, *super_glue, *averages)
    scores = (Text(MISSING if x is None else f"{x:.1f}") for x in numbers)
    return (Text(row.method), Text(row.parameters or MISSING), *scores)
