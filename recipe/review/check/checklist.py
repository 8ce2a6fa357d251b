"""What a training recipe must hold: the guideline's checklist and what this project adds to it, as one table."""

from __future__ import annotations

from dataclasses import dataclass

GUIDELINE, EXTENSION = "guideline", "extension"


@dataclass(frozen=True)
class Item:
    """One thing that a reader needs: a row of the generated block `block`, matched by `row`.

    A missing item that is not `required` is a note.
    """

    section: str
    name: str
    block: str
    row: str
    source: str = GUIDELINE
    required: bool = True


RAW, PROCESSING = "Data / Raw data", "Data / Processing methods"
OPTIMIZATION, METRICS = "Training / Optimization methods", "Training / Performance metrics"
INFERENCE, REST, TWIN = "Inference", "Miscellaneous", "Machine-readable form"
RAN = r"^\| Tree \|"

ITEMS = (
    Item(RAW, "description of the data", "raw_data", r"^\| Summary \|"),
    Item(RAW, "how the data came to be", "raw_data", r"^\| Origin \|"),
    Item(RAW, "labels and their schema", "raw_data", r"^\| Labels \|"),
    Item(RAW, "label convention with examples", "raw_data", r"^\| Label convention \|", EXTENSION),
    Item(RAW, "known biases", "raw_data", r"^\| Known biases \|", required=False),
    Item(RAW, "schema for adding samples", "raw_data", r"^\| Adding samples \|", required=False),
    Item(RAW, "path", "raw_data", r"^\| Raw data \|"),
    Item(RAW, "access rules", "raw_data", r"^\| Access \|"),
    Item(RAW, "licence", "raw_data", r"^\| Licence \|", EXTENSION),
    Item(RAW, "split sizes", "raw_data", r"^\| Split \(\*measured\*\) \|", EXTENSION),
    Item(RAW, "data checksums", "raw_data", r"^\| SHA-256 of the raw images of ", EXTENSION),
    Item(PROCESSING, "description", "processing_methods", r"^\| Stored as \|"),
    Item(PROCESSING, "how the test set is made", "raw_data", r"^\| Test set \|"),
    Item(PROCESSING, "code and command", "processing_methods", r"^python \S+"),
    Item(PROCESSING, "commit", "processing_methods", RAN),
    Item(PROCESSING, "path of the processed data", "processing_methods", r"^\| Processed data \|", required=False),
    Item(OPTIMIZATION, "architecture", "optimization_methods", r"^\| Network \|"),
    Item(OPTIMIZATION, "loss", "optimization_methods", r"^\| Loss \|"),
    Item(OPTIMIZATION, "code and command", "optimization_methods", r"^(python|torchrun) \S+"),
    Item(OPTIMIZATION, "commit", "optimization_methods", RAN),
    Item(OPTIMIZATION, "batch size", "optimization_methods", r"^\| Images per optimizer step \|"),
    Item(OPTIMIZATION, "number of GPUs or processes", "optimization_methods", r"^\| Processes \|"),
    Item(OPTIMIZATION, "optimizer", "optimization_methods", r"^Optimizer "),
    Item(OPTIMIZATION, "weight decay", "optimization_methods", r"^\| [^|]+ \|[^|]*\|[^|]*\|.*\bweight_decay\b"),
    Item(OPTIMIZATION, "learning rate and its schedule", "optimization_methods", r"^\| Learning rate \|"),
    Item(OPTIMIZATION, "length of training", "optimization_methods", r"^\d[\d,]* steps, "),
    Item(OPTIMIZATION, "augmentation", "optimization_methods", r"^\| Augmentation \|"),
    Item(OPTIMIZATION, "initial weights", "optimization_methods", r"^\| Initial weights \|", required=False),
    Item(OPTIMIZATION, "seed", "optimization_methods", r"^\| Seed \|", EXTENSION),
    Item(OPTIMIZATION, "level of determinism", "optimization_methods", r"^\| Arithmetic \| \*recorded", EXTENSION),
    Item(OPTIMIZATION, "environment with versions", "optimization_methods", r"^\| Versions \|", EXTENSION),
    Item(OPTIMIZATION, "training hardware", "optimization_methods", r"^\| Hardware \|", EXTENSION),
    Item(OPTIMIZATION, "dynamics: total time", "dynamics", r"^\| Training \|"),
    Item(OPTIMIZATION, "dynamics: losses and metrics over time", "dynamics", r"^\| Epoch \(\*measured\*\) \|"),
    Item(OPTIMIZATION, "outputs: where the model is", "outputs", r"^\| output weights \|"),
    Item(OPTIMIZATION, "checkpoint selection", "outputs", r"Selection: ", EXTENSION),
    Item(METRICS, "target metrics", "performance_metrics", r"^\| \*\*Top-1 accuracy\*\* \|"),
    Item(METRICS, "code and command", "performance_metrics", r"^(python|torchrun) \S+"),
    Item(METRICS, "commit", "performance_metrics", RAN),
    Item(METRICS, "evaluation protocol", "performance_metrics", r"^\| Protocol \|", EXTENSION),
    Item(METRICS, "number of runs and spread", "performance_metrics", r"^\| Runs \|", EXTENSION, required=False),
    Item(
        METRICS,
        "tolerance: when a second run is on track",
        "performance_metrics",
        r"^\| Tolerance \|",
        EXTENSION,
        required=False,
    ),
    Item(METRICS, "expected result and its source", "summary", r"^\| \*\*Expected\*\* \|", EXTENSION, required=False),
    Item(INFERENCE, "code", "inference", r"The notebook `inference\.ipynb`"),
    Item(INFERENCE, "timing", "inference", r"^\| Hardware \| Pixels \| Backend \|"),
    Item(INFERENCE, "serialization", "inference", r"^\| Variant \(\*measured\*\) \|", required=False),
    Item(
        INFERENCE,
        "parity of the exported model",
        "inference",
        r"^\| Variant \(.*Images that change their class",
        EXTENSION,
        required=False,
    ),
    Item(REST, "papers", "miscellaneous", r"^- .+ \(\*declared\*\)", required=False),
    Item(REST, "journal of experiments", "miscellaneous", r"^### Journal", required=False),
    Item(REST, "action items", "miscellaneous", r"(?s)### Action items\n\n- ", required=False),
    Item(TWIN, "configuration for programs", "recipe", r"^```json", EXTENSION),
    Item(TWIN, "verification command", "run_again", r"hash of its weights", EXTENSION, required=False),
)
