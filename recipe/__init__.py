"""The reference ResNet-50 / ImageNet pipeline that emits its own recipe. The map, in reading order:

ground floor, importable without torch
    streams        standard output that cannot end the work
    errors         what stops a run, each kind with its exit code
    signals        from a scheduler, a terminal that closes, Ctrl-C
    launcher       which of how many processes this one is
    config         schema (settings with their bounds), compose (Hydra -> Config), identity (hashes)
    files          atomic writing, locks, reading files of others, paths as text
    metrics        the rows of metrics.jsonl
    records        the results of every stage: frozen structs <-> JSON, and the table of them
    run            the known files of a run directory
    experiment_log one line for each stage started and ended
    environment    the command line, versions, environment variables and machine of a stage
    provenance     its commit, tree state and patch; the hash of the source
ground floor, torch
    distributed    launch(), World, reductions
    alterations    blur pooling, stochastic depth, the initial bias of the head
    checkpoint     atomic save, verified load; files of torch.save as plain data
    weights        pretrained weights: files of other training scripts, torchvision's
    model          ResNet-50 and its sources, finished here
chapters
    data           shards -> batches: images and integrity (checks of one image, which preprocessing shares), manifest,
                   shards, decoding, transforms, loading; worker, processes; progress
    preprocessing  raw images -> shards: pipeline, sources, ilsvrc, imagenet (facts), folders, archives, listing,
                   shard_writer, sharing, summary; painting, demo: the drawn set
    evaluation     evaluate(predict, batches) -> integer counts; the one evaluator of every stage
    inference      onnx_file, export, parity, evaluated, serialization: checkpoint -> files that passed the gate;
                   pictures, classifier: one picture -> the best classes; timing: latencies of this machine
    performance    a checkpoint, an exported file or published weights on the whole validation set
    training       loop; build, optim, step, ema; checkpointing, shutdown, watchdog, metrics, metric_log,
                   energy, record; fingerprint
    doctor         python -m recipe doctor: what bounds the speed of an experiment on this machine
    document       run_data, blocks, curves, recipe_json, latency, commands, experiment_log, formatting, figures,
                   render: from records to pages, without torch; model_card, published_folder, publish: a run as a
                   folder to commit, and the table of those
    review         opening: a recipe that a reader points at; reading: its records, one by one; outputs: its files,
                   measured again; findings. A folder for each verb: check/ (checklist, presence, page, records,
                   document, code, files), verify/ (files: the chain; trace; code: the verb drift), diff/ (inputs,
                   differences, impact), watch/ (reference, statistics, report), reproduce/ (parse: a document as
                   data; adapt: to this machine; judge, report)
the example
    demonstration  inference.ipynb: a run's model on pictures, from every file; python -m recipe.stages.infer runs it
"""

import os

# Before torch loads its OpenMP runtime: threads that wait are to sleep, not to spin. Spinning ones take the cores from
# the threads that decode; on 2 busy cores training the `smoke` network was 6 to 7 times slower with them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
