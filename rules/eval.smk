# Every question of every benchmark, asked of the teacher and of every student.
# Needs: results/{experiment}/data/ and a model: the packed folder where weights are integers, the bf16 folder
# otherwise. Makes: predictions/{benchmark}.parquet, consumed through predictions/manifest.json. One job asks all
# benchmarks, because start-up costs more than a benchmark; predictions that still hold are kept.


rule evaluate:
    input:
        run="results/{experiment}/config/evaluation.json",
        model=plan.shipped,
        data="results/{experiment}/data/manifest.json",
        code=plan.code("grace.evaluate.verbs"),
    output:
        "results/{experiment}/students/{recipe}/{precision}/seed{seed}/predictions/manifest.json",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/evaluate.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/evaluate.tsv"
    priority: 30
    conda:
        "../envs/grace.yaml"
    threads: plan.threads("evaluate")
    resources:
        **plan.resources("evaluate"),
    params:
        model=subpath(input.model, parent=True),
        data=subpath(input.data, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "evaluate {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace evaluate --run {input.run:q} --model {params.model:q} --data {params.data:q} --out {params.out:q}"
        " > {log:q} 2>&1"


use rule evaluate as evaluate_teacher with:
    input:
        run="results/{experiment}/config/evaluation.json",
        model="results/{experiment}/teacher/model/manifest.json",
        data="results/{experiment}/data/manifest.json",
        code=plan.code("grace.evaluate.verbs"),
    output:
        "results/{experiment}/teacher/predictions/manifest.json",
    log:
        "results/{experiment}/logs/teacher/evaluate.log",
    benchmark:
        "results/{experiment}/logs/teacher/evaluate.tsv"
    message:
        "evaluate the teacher"
