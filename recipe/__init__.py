"""The reference ResNet-50 / ImageNet pipeline that emits its own recipe. The map, in reading order:

ground floor, importable without torch
    streams        standard output that cannot end the work
    errors         what stops a run, each kind with its exit code
    signals        from a scheduler, a terminal that closes, Ctrl-C
    launcher       which of how many processes this one is
    config         typed schema of every knob, cross-field checks, identity of a recipe
    files          files and names that may come from a stranger
    metrics        the rows of metrics.jsonl
    records        what each stage leaves behind: frozen records <-> JSON
    run            the known files of a run directory; atomic writes
    environment    the command line, versions, environment variables and machine of a stage
    provenance     its commit, tree state and patch; the hash of the source
    composition    from the command line to a Config
ground floor, torch
    distributed    launch(), World, reductions
    alterations    blur pooling, stochastic depth, the initial bias of the head
    checkpoint     atomic save, verified load; files of torch.save as plain data
    weights        pretrained weights: files of other training scripts, torchvision's
    model          ResNet-50 and its sources, finished here
chapters
    data           imagenet (facts); painting, demo (the drawn set); raw (dispatch), ilsvrc, folders, archives, listing,
                   system_files, look_alikes; images, integrity, shards, packing, merging, expectation, sharing,
                   processing, reporting, progress; adoption;
                   decoding, transforms, interface; augment/: crop, auto_augment, mixup, rng;
                   batches, loader (threads), worker_pool and worker (processes)
    evaluation     evaluate(predict, batches) -> integer counts; the one evaluator of every stage
    inference      onnx_file, export, parity, evaluated, serialization: checkpoint -> files that passed the gate;
                   pictures, classifier: one picture -> the best classes; timing: latencies of this machine
    performance    a checkpoint, an exported file or published weights on the whole validation set
    training       loop; build, optim, step, ema; checkpointing, shutdown, watchdog, metrics, metric_log,
                   energy, record; fingerprint
    doctor         python -m recipe doctor: what bounds the speed of an experiment on this machine
    document       facts, blocks, dynamics, claims, latency, commands, experiment_log, formatting, figures, render: from
                   records to pages, without torch; model_card, published_folder, publish: a run as a folder to
                   commit, and the table of those
    review         opening: a recipe that a reader points at; reading: its records, one by one; outputs: its files,
                   measured again; findings. A folder for each verb: check/ (checklist, presence, page, records,
                   document, code, files), verify/ (files: the chain; trace; code: the verb drift), diff/ (inputs,
                   differences, impact), watch/ (reference, statistics, report), reproduce/ (parse: a document as
                   data; adapt: to this machine; judge, report)
the example
    demonstration  inference.ipynb: a run's model on pictures, from every file; python -m recipe.demonstration runs it
"""

import os

# Before torch loads its OpenMP runtime: threads that wait are to sleep, not to spin. Spinning ones take the cores from
# the threads that decode; on 2 busy cores training the `smoke` network was 6 to 7 times slower with them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
