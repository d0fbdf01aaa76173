# Every question of every benchmark, asked of the teacher and of every student.
# Needs: results/{experiment}/data/ and models: of a student the packed folder where weights are integers, the bf16
# folder otherwise. Makes: predictions/{benchmark}.parquet of each, consumed through predictions/manifest.json. One job
# asks all benchmarks of one model, and on the way models that wait for theirs; predictions that still hold are kept.


rule evaluate:
    input:
        run="results/{experiment}/config/evaluation.json",
        language=plan.language,
        data="results/{experiment}/data/manifest.json",
        model=plan.shipped,
        code=plan.code("evaluate"),
    output:
        "results/{experiment}/{model}/predictions/manifest.json",
    log:
        "results/{experiment}/logs/{model}/evaluate.log",
    benchmark:
        "results/{experiment}/logs/{model}/evaluate.tsv"
    wildcard_constraints:
        model=only.asked,
    priority: 30
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("evaluate")
    resources:
        **jobs.resources("evaluate"),
    params:
        data=subpath(input.data, parent=True),
        model=subpath(input.model, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "evaluate {wildcards.model}"
    shell:
        "grace evaluate"
        " --processes {resources.gpu}"
        " --run {input.run:q}"
        " --data {params.data:q}"
        " --model {params.model:q}"
        " --out {params.out:q}"
        " --others results/{wildcards.experiment:q}"
        " > {log:q} 2>&1"


# Questions that show an image which was trained on: the same bytes, or nearly the same look.
rule overlap:
    input:
        run="results/{experiment}/config/evaluation.json",
        data="results/{experiment}/data/manifest.json",
        code=plan.code("overlap"),
    output:
        "results/{experiment}/overlap.json",
    log:
        "results/{experiment}/logs/overlap.log",
    benchmark:
        "results/{experiment}/logs/overlap.tsv"
    wildcard_constraints:
        experiment=only.where(plan.overlap),
    priority: 20
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("prepare")
    resources:
        **jobs.resources("prepare"),
    params:
        data=subpath(input.data, parent=True),
    message:
        "look for training images in the benchmarks"
    shell:
        "grace overlap"
        " --run {input.run:q}"
        " --data {params.data:q}"
        " --workers {threads}"
        " --out {output:q}"
        " > {log:q} 2>&1"
