"""The reference ResNet-50 / ImageNet pipeline that emits its own recipe.

The floors, lowest first. A file imports only from floors below it and from its own package:
    errors         exceptions and their exit codes
    run            the run directory: directory (with the journal), files (atomic writing, locks, paths), records (the
                   results of stages), provenance (commit, tree, patch), environment (versions, hardware), metric_rows,
                   progress, and of the process: launcher, terminal (signals, streams)
    config         schema (settings with their bounds), compose (Hydra -> Config), identity (hashes, differences)
    models         build (ResNet-50 and its relatives), layers, checkpoint, pretrained
    distributed    launch(), World, reductions
    document       records -> pages, without torch: run_data, render, templates/, blocks, formatting, curves, figures,
                   commands, experiment_log, latency, recipe_json, model_card, publish
    data           shards -> batches: images, integrity, manifest, shards, decoding, transforms, batches,
                   loader (threads), worker_pool and worker (processes), augment/ (crop, auto_augment, mixup, rng)
    evaluation     evaluate(predict, batches) -> integer counts, the evaluator of every stage
    preprocessing  raw images -> shards: pipeline, sources, ilsvrc, imagenet, folders, archives, listing, shard_writer,
                   sharing (several nodes), summary, demo and painting (the drawn data set)
    training       loop, build, step, optim, ema, checkpointing, shutdown, watchdog, metrics, metric_log,
                   record (with energy), fingerprint
    inference      classifier, pictures, export (of the evaluated checkpoint), onnx_file, parity, latency
    stages         evaluate, serialize, infer (inference.ipynb), doctor
    review         readers of a recipe: opening (with its records), findings, a folder for each verb: check/, verify/,
                   diff/, watch/, reproduce/
    __main__       python -m recipe VERB
"""

import os

# Set before torch loads its OpenMP runtime: waiting threads should sleep, not spin. Spinning ones take
# cores from decoding threads: training of the `smoke` network was 6 to 7 times slower on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
