# The teacher, and the cache that students read instead of it.
# Needs: results/{experiment}/data/. Makes: results/{experiment}/teacher/model/ and results/{experiment}/teacher/cache/.


# A pretrained teacher, from a folder or the hub.
rule fetch_teacher:
    input:
        source="results/{experiment}/config/teacher-source.json",
        code=plan.code("fetch"),
    output:
        "results/{experiment}/teacher/model/manifest.json",
    log:
        "results/{experiment}/logs/teacher/fetch.log",
    benchmark:
        "results/{experiment}/logs/teacher/fetch.tsv"
    wildcard_constraints:
        experiment=only.where(plan.experiment.teacher.pretrained),
    priority: 95
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("fetch")
    resources:
        **jobs.resources("fetch"),
    params:
        out=subpath(output[0], parent=True),
        model=plan.experiment.teacher.pretrained,
        revision=plan.revision_flag(plan.experiment.teacher),
    message:
        "fetch the teacher {params.model}"
    shell:
        "grace fetch"
        " {params.model:q}"
        " {params.revision}"
        " --source {input.source:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


# A teacher trained here. A killed run goes on from its last checkpoint.
rule train_teacher:
    input:
        run="results/{experiment}/config/teacher.json",
        data="results/{experiment}/data/manifest.json",
        code=plan.code("train"),
    output:
        model="results/{experiment}/teacher/model/manifest.json",
        curve="results/{experiment}/teacher/train.jsonl",
    log:
        "results/{experiment}/logs/teacher/train.log",
    benchmark:
        "results/{experiment}/logs/teacher/train.tsv"
    wildcard_constraints:
        experiment=only.where(plan.experiment.teacher.train),
    priority: 95
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("train_teacher")
    resources:
        **jobs.resources("train_teacher"),
    params:
        data=plan.pretraining,
        out=subpath(output.model, parent=True),
        checkpoints="results/{experiment}/.checkpoints/teacher",
    message:
        "train the teacher"
    shell:
        "grace train"
        " --nodes {resources.nodes}"
        " --processes $(({resources.gpu} + {resources.processes}))"
        " --run {input.run:q}"
        " --data {params.data:q}"
        " --out {params.out:q}"
        " --log {output.curve:q}"
        " --checkpoints {params.checkpoints:q}"
        " > {log:q} 2>&1"


# One part of the cache: the teacher's states over its share of the conversations. Parts are independent jobs.
rule write_cache:
    input:
        run="results/{experiment}/config/cache.json",
        teacher="results/{experiment}/teacher/model/manifest.json",
        data="results/{experiment}/data/manifest.json",
        code=plan.code("cache-write"),
    output:
        states=plan.cache_part("safetensors"),
        index=plan.cache_part("json"),
    log:
        "results/{experiment}/logs/teacher/cache-{shard}.log",
    benchmark:
        "results/{experiment}/logs/teacher/cache-{shard}.tsv"
    priority: 90
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("cache")
    resources:
        **jobs.resources("cache"),
    params:
        teacher=subpath(input.teacher, parent=True),
        data=subpath(input.data, parent=True),
        out=subpath(output.index, parent=True),
    message:
        "write part {wildcards.shard} of the teacher's cache"
    shell:
        "grace cache write"
        " --run {input.run:q}"
        " --teacher {params.teacher:q}"
        " --data {params.data:q}"
        " --shard $((10#{wildcards.shard}))"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


# The cache as a whole: every part is there, its error is measured, and the manifest pins what it was made from.
# The parts' states are large and described by their indexes, so that their times do not matter.
rule finish_cache:
    input:
        run="results/{experiment}/config/cache.json",
        teacher="results/{experiment}/teacher/model/manifest.json",
        data="results/{experiment}/data/manifest.json",
        indexes=plan.cache_parts("json"),
        states=ancient(plan.cache_parts("safetensors")),
        code=plan.code("cache-finish"),
    output:
        "results/{experiment}/teacher/cache/manifest.json",
    log:
        "results/{experiment}/logs/teacher/cache.log",
    benchmark:
        "results/{experiment}/logs/teacher/cache.tsv"
    priority: 90
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("cache")
    resources:
        **jobs.resources("cache"),
    params:
        teacher=subpath(input.teacher, parent=True),
        data=subpath(input.data, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "check and close the teacher's cache"
    shell:
        "grace cache finish"
        " --run {input.run:q}"
        " --teacher {params.teacher:q}"
        " --data {params.data:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"
