"""What a training recipe must hold: the guideline's checklist and what this project adds to it, as one table.

For a document of this pipeline an item is a row of a generated block; for any other it is a heading or a keyword,
which shows that something is said, and never that it is true.
"""

from __future__ import annotations

from dataclasses import dataclass

GUIDELINE, EXTENSION = "guideline", "extension"


@dataclass(frozen=True)
class Item:
    """One thing that a reader needs.

    `row` is found in the generated block `block` where the item is there. `heading` and `keyword` are looked for in
    documents that people wrote; both ignore case. A missing item that is not `required` is a note.
    """

    section: str
    name: str
    block: str
    row: str
    heading: str
    keyword: str
    source: str = GUIDELINE
    required: bool = True


RAW, PROCESSING = "Data / Raw data", "Data / Processing methods"
OPTIMIZATION, METRICS = "Training / Optimization methods", "Training / Performance metrics"
INFERENCE, REST, TWIN = "Inference", "Miscellaneous", "Machine-readable form"
NONE = r"(?!)"
SHA = r"\b[0-9a-f]{40}\b|\b(commit|sha-?1|revision)\b.{0,30}\b[0-9a-f]{7,40}\b"
RAN = r"^\| Tree \|"
VERSION = r"v?\d+\.\d+"

ITEMS = (
    # Data
    Item(
        *(RAW, "description of the data", "raw_data", r"^\| Summary \|"),
        r"^(the |raw |training |training and evaluation )*data( ?sets?)?\b",
        r"\b(data ?set|corpus)\b.{0,60}\b(contains|consists|comprises|holds|has|of) .{0,40}\b(images|samples)\b"
        r"|\b\d[\d,.]* ?[km]?(illion)? (training )?(images|photographs|samples|examples)\b",
    ),
    Item(
        *(RAW, "how the data came to be", "raw_data", r"^\| Origin \|"),
        r"\b(origin|provenance|collection|annotation)\b",
        r"\b(collected|crawled|scraped|annotated|gathered|photographed|drawn) (from|by|at|in|with)\b",
    ),
    Item(
        *(RAW, "labels and their schema", "raw_data", r"^\| Labels \|"),
        r"\blabels?\b|\bschema\b|\bclasses\b",
        r"\blabels?\b.{0,50}\b(class(es)?|index|indices|from [01]|schema|convention)\b|\b(id2label|label2id)\b",
    ),
    Item(
        *(RAW, "label convention with examples", "raw_data", r"^\| Label convention \|"),
        r"\blabel convention\b",
        r"\b(id2label|label2id)\b|\b(numbered|counted|indexed|starts?|starting) (from|at) (0|1|zero|one)\b"
        r"|\bclass ind(ex|ices)\b.{0,40}\b(from|sorted|start)",
        EXTENSION,
    ),
    Item(
        *(RAW, "known biases", "raw_data", r"^\| Known biases \|"),
        r"\bbias(es)?\b",
        r"\b(biases|biased)\b",
        required=False,
    ),
    Item(
        *(RAW, "schema for adding samples", "raw_data", r"^\| Adding samples \|"),
        r"\badding (new )?(samples|data|images)\b",
        r"\badd(ing)? (new |more )?(samples|images|data|examples)\b",
        required=False,
    ),
    Item(
        *(RAW, "path", "raw_data", r"^\| Raw data \|"),
        r"\bpath\b|\bwhere the data\b",
        r"\b(hdfs|s3|gs):|\bdownload(ed|able)?\b.{0,30}\bfrom\b|^datasets?:|\bdata\b.{0,40}https?://",
    ),
    Item(
        *(RAW, "access rules", "raw_data", r"^\| Access \|"),
        r"\b(access|governance)\b",
        r"\b(access (rules|rights|to)|data governance|registration|terms of (use|access)|publicly available)\b",
    ),
    Item(
        *(RAW, "licence", "raw_data", r"^\| Licence \|"),
        r"\blicen[cs]e\b",
        r"^licen[cs]e:|\blicen[cs]ed?\b",
        EXTENSION,
    ),
    Item(
        *(RAW, "split sizes", "raw_data", r"^\| Split \(\*measured\*\) \|"),
        r"\bsplit sizes?\b",
        r"\b(train(ing)?|validation|test|eval(uation)?)\b[^.|\n]{0,40}\b\d{1,3}([, ]\d{3})+\b"
        r"|\b\d[\d,]*\d (training|validation|test|evaluation) (images|samples|examples)\b",
        EXTENSION,
    ),
    Item(
        *(RAW, "data checksums", "raw_data", r"^\| SHA-256 of the raw images of "),
        r"\bchecksums?\b",
        r"\b(sha-?256|md5)\b|\bchecksums?\b",
        EXTENSION,
    ),
    Item(
        *(PROCESSING, "description", "processing_methods", r"^\| Stored as \|"),
        r"\b(pre-?)?process(ing|ed)\b|\bdata preparation\b",
        r"\b(pre-?process|normali[sz]|convert|shard|encode|tokeni[sz]|resi[sz])(e|es|ed|ing)?\b",
    ),
    Item(
        *(PROCESSING, "how the test set is made", "raw_data", r"^\| Test set \|"),
        r"\b(test|validation|evaluation) (set|split|data)\b|\bevaluation data\b",
        r"\b(validation|test|held[- ]out|evaluation) (set|split|images)\b.{0,20}\b(was|were|is|are|drawn|taken|made)\b",
    ),
    Item(
        *(PROCESSING, "code and command", "processing_methods", r"^python \S+"),
        NONE,
        r"\b(pre-?process|prepare|convert|build|download)\w*\.(py|sh|ipynb)\b",
    ),
    Item(
        *(PROCESSING, "commit", "processing_methods", RAN),
        NONE,
        rf"(pre-?process|prepar|convert).{{0,120}}({SHA})|({SHA}).{{0,120}}(pre-?process|prepar|convert)",
    ),
    Item(
        *(PROCESSING, "path of the processed data", "processing_methods", r"^\| Processed data \|"),
        r"\bprocessed data\b",
        r"\b(tfrecords?|shards?|processed (data|images))\b.{0,60}(://?|\./|\bdata/)",
        required=False,
    ),
    # Training
    Item(
        *(OPTIMIZATION, "architecture", "optimization_methods", r"^\| Network \|"),
        r"\b(architecture|model( description)?|network)\b",
        r"\b(resnet|vgg|vit|convnext|efficientnet|mobilenet|(distil|ro)?bert\w*|gpt|t5|llama|transformer)\b"
        r"|\barchitecture\b",
    ),
    Item(
        *(OPTIMIZATION, "loss", "optimization_methods", r"^\| Loss \|"),
        r"\bloss function\b",
        r"\bcross[- ]?entropy\b|\bloss function\b|\bminimi[sz]e\b|\bcriterion\b",
    ),
    Item(
        *(OPTIMIZATION, "code and command", "optimization_methods", r"^(python|torchrun) \S+"),
        r"\btraining (script|command|code)\b",
        r"\btrain\w*\.(py|sh)\b|\brun_\w+\.py\b|\btorchrun\b|\baccelerate launch\b",
    ),
    Item(
        *(OPTIMIZATION, "commit", "optimization_methods", RAN),
        NONE,
        SHA,
    ),
    Item(
        *(OPTIMIZATION, "batch size", "optimization_methods", r"^\| Images per optimizer step \|"),
        NONE,
        r"batch[ _-]?sizes?\b|\bbatch(es)? of \d+",
    ),
    Item(
        *(OPTIMIZATION, "number of GPUs or processes", "optimization_methods", r"^\| Processes \|"),
        NONE,
        r"\b(\d+|one|two|four|eight|single)( \w+){0,2} (gpus?|tpus?|devices|nodes)\b|\bnum_(gpus|devices|processes)\b",
    ),
    Item(
        *(OPTIMIZATION, "optimizer", "optimization_methods", r"^Optimizer "),
        NONE,
        r"\b(sgd|adamw?|lamb|rmsprop|adafactor|adagrad)\b|\boptimi[sz]er\b|\bmomentum\b",
    ),
    Item(
        *(OPTIMIZATION, "weight decay", "optimization_methods", r"^\| [^|]+ \|[^|]*\|[^|]*\|.*\bweight_decay\b"),
        NONE,
        r"\bweight[ _-]decay\b|\bl2[- ]regulari[sz]ation\b",
    ),
    Item(
        *(OPTIMIZATION, "learning rate and its schedule", "optimization_methods", r"^\| Learning rate \|"),
        r"\blearning rate\b",
        r"\blearning[ _-]rate\b",
    ),
    Item(
        *(OPTIMIZATION, "length of training", "optimization_methods", r"^\d[\d,]* steps, "),
        NONE,
        r"\b\d[\d,.]* ?k? (epochs|iterations|steps)\b|\b(num_)?(train_)?epochs: ?\d|\bmax_steps\b",
    ),
    Item(
        *(OPTIMIZATION, "augmentation", "optimization_methods", r"^\| Augmentation \|"),
        r"\baugmentations?\b",
        r"\baugment(ed|ations?)?\b|\brandom(ly)? (crop|resi[sz]|flip|erase)|\b(mix-?up|cut-?mix)\b"
        r"|\b(cropped|flipped|erased) (at random|randomly)\b|\bhorizontal flip",
    ),
    Item(
        *(OPTIMIZATION, "initial weights", "optimization_methods", r"^\| Initial weights \|"),
        NONE,
        r"\bpre-?trained\b|\bfrom scratch\b|\bfine-?tun(ed|ing)\b|\binitiali[sz](ed|er|ation)\b|^base_model:",
        required=False,
    ),
    Item(
        *(OPTIMIZATION, "seed", "optimization_methods", r"^\| Seed \|"),
        NONE,
        r"\bseeds?\b",
        EXTENSION,
    ),
    Item(
        *(
            OPTIMIZATION,
            "level of determinism",
            "optimization_methods",
            r"^\| Arithmetic \| \*recorded",
        ),
        r"\bdeterminism\b",
        r"\b(non-?)?determinis(tic|m)\b|\bbit-?(exact|identical|wise)\b",
        EXTENSION,
    ),
    Item(
        *(OPTIMIZATION, "environment with versions", "optimization_methods", r"^\| Versions \|"),
        r"\b(framework versions|requirements|environment)\b",
        rf"\b((py)?torch|tensorflow|transformers|jax|cuda|python)\W{{0,4}}(version )?{VERSION}"
        r"|\brequirements\.txt\b|\benvironment\.ya?ml\b|\bpoetry\.lock\b",
        EXTENSION,
    ),
    Item(
        *(OPTIMIZATION, "training hardware", "optimization_methods", r"^\| Hardware \|"),
        r"\bhardware\b",
        r"\b(trained|training|gpus?)\b.{0,60}\b(v100|p100|a100|h100|h200|t4|k80|l4|rtx ?\d+|tpu|titan|xeon|epyc)s?\b"
        r"|\b(v100|p100|a100|h100|h200|t4|k80|l4|rtx ?\d+|tpu|titan)s?\b.{0,30}\b(train|hours|days)",
        EXTENSION,
    ),
    Item(
        *(OPTIMIZATION, "dynamics: total time", "dynamics", r"^\| Training \|"),
        r"\btraining time\b",
        r"\b\d+(\.\d+)? ?(hours?|hrs?|days?)\b|\btraining time\b",
    ),
    Item(
        *(OPTIMIZATION, "dynamics: losses and metrics over time", "dynamics", r"^\| Epoch \(\*measured\*\) \|"),
        r"\b(dynamics|training results|learning curves?)\b",
        r"\b(loss|accuracy)\b.{0,60}\b(curves?|plots?|figures?|over (the )?(epochs|steps))\b"
        r"|\b(curves?|plots?|figures?)\b.{0,30}\b(loss|accuracy)\b"
        r"|^\|.{0,120}\b(epoch\b.{0,120}\bloss|loss\b.{0,120}\bepoch)\b",
    ),
    Item(
        *(OPTIMIZATION, "outputs: where the model is", "outputs", r"^\| output weights \|"),
        r"\boutputs?\b",
        r"\b(checkpoints?|weights|model)\b.{0,40}\b(stored|saved|uploaded|available|found|published)\b"
        r"|^library_name:",
    ),
    Item(
        *(OPTIMIZATION, "checkpoint selection", "outputs", r"Selection: "),
        NONE,
        r"\b(last|best|final) (checkpoint|epoch|weights)\b|\bearly[- ]stopping\b|\bload_best_model",
        EXTENSION,
    ),
    # Metrics
    Item(
        *(METRICS, "target metrics", "performance_metrics", r"^\| \*\*Top-1 accuracy\*\* \|"),
        r"\b(metrics|results|evaluation|performance)\b",
        r"\b(top-?[15]|accuracy|f1|bleu|perplexity|map)\b[^\n]{0,40}\d",
    ),
    Item(
        *(METRICS, "code and command", "performance_metrics", r"^(python|torchrun) \S+"),
        NONE,
        r"\beval\w*\.(py|sh)\b|\b(test|validate|benchmark)\.py\b|--eval\b|\bevaluation (script|command)\b",
    ),
    Item(
        *(METRICS, "commit", "performance_metrics", RAN),
        NONE,
        rf"\beval.{{0,120}}({SHA})|({SHA}).{{0,120}}\beval",
    ),
    Item(
        *(METRICS, "evaluation protocol", "performance_metrics", r"^\| Protocol \|"),
        r"\b(evaluation )?protocol\b",
        r"\b(single|cent(er|re)|ten|10)[- ]crop\b|\bresi[sz](e|ed|ing)\b.{0,40}\b\d{3}\b|\binterpolation\b",
        EXTENSION,
    ),
    Item(
        *(METRICS, "number of runs and spread", "performance_metrics", r"^\| Runs \|"),
        NONE,
        r"±|\+/-|\bstandard deviation\b|\bstd\b|\b\d+ (runs|seeds)\b|\b(mean|median) of \d+\b",
        EXTENSION,
        required=False,
    ),
    Item(
        *(METRICS, "tolerance: when a second run is on track", "performance_metrics", r"^\| Tolerance \|"),
        r"\b(tolerance|on track)\b",
        r"\btolerance\b|\bon[- ]track\b|\bwithin \d+(\.\d+)? ?(%|points|pp)",
        EXTENSION,
        required=False,
    ),
    Item(
        *(METRICS, "expected result and its source", "summary", r"^\| \*\*Expected\*\* \|"),
        NONE,
        r"\b(expected|published|reported) (accuracy|result|top-?1|value)s?\b|\b(below|above) (the )?published\b",
        EXTENSION,
        required=False,
    ),
    # Inference
    Item(
        *(INFERENCE, "code", "inference", r"The notebook `inference\.ipynb`"),
        r"\b(inference|usage|how to use)\b",
        r"\b\w+\.ipynb\b|\binference\w*\.py\b|\bfrom_pretrained\(|\bpipeline\(",
    ),
    Item(
        *(INFERENCE, "timing", "inference", r"^\| Hardware \| Pixels \| Backend \|"),
        r"\b(timing|latency|throughput)\b",
        r"\b\d+(\.\d+)? ?(ms|milliseconds)\b|\blatency\b|\b(images|samples) ?(/|per) ?s(ec(ond)?)?\b",
    ),
    Item(
        *(INFERENCE, "serialization", "inference", r"^\| Variant \(\*measured\*\) \|"),
        r"\bserialization\b|\bexport\b",
        r"\b(onnx|tflite|torchscript|saved ?model|tensorrt|coreml)\b",
        required=False,
    ),
    Item(
        *(INFERENCE, "parity of the exported model", "inference", r"^\| Variant \(.*Images that change their class"),
        r"\bparity\b",
        r"\bparity\b|\b(exported|onnx|tflite)\b.{0,60}\b(agree|match|equal|differ|identical)\w*\b",
        EXTENSION,
        required=False,
    ),
    # Miscellaneous
    Item(
        *(REST, "papers", "miscellaneous", r"^- .+ \(\*declared\*\)"),
        r"\b(papers?|references|citation)\b",
        r"\barxiv\b|\bet al\.|\bdoi\.org\b|@(article|inproceedings|misc)\{",
        required=False,
    ),
    Item(
        *(REST, "journal of experiments", "miscellaneous", r"^### Journal"),
        r"\bjournal\b|\bexperiment log\b",
        r"\bjournal of experiments\b|\b(previous|earlier|failed) (attempts|runs|experiments)\b",
        required=False,
    ),
    Item(
        *(REST, "action items", "miscellaneous", r"(?s)### Action items\n\n- "),
        r"\b(action items?|future work|next steps|limitations|known issues)\b",
        r"\baction items?\b|\btodo\b|\bfuture work\b",
        required=False,
    ),
    Item(
        *(TWIN, "configuration for programs", "recipe", r"^```json"),
        NONE,
        r"^model-index:|^```json|\brecipe\.json\b|\bconfig\.ya?ml\b",
        EXTENSION,
    ),
    Item(
        *(TWIN, "verification command", "run_again", r"hash of its weights"),
        r"\bverif(y|ication)\b",
        r"\bverif(y|ied|ication)\b.{0,60}\b(run|command|python|hash|sha)\b|\bsha256sum\b",
        EXTENSION,
        required=False,
    ),
)
