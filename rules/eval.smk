# Every question of every benchmark, asked of the teacher and of every student.
# Needs: results/{experiment}/data/ and models: of a student the packed folder where weights are integers, the bf16
# folder otherwise. Makes: predictions/{benchmark}.parquet of each, consumed through predictions/manifest.json. One job
# asks all benchmarks, and on processors all students of a recipe, because starting costs more than asking; predictions
# that still hold are kept.

for asking in plan.asking:

    rule:
        name:
            asking.rule
        input:
            run=f"{plan.folder}/config/evaluation.json",
            language=plan.language,
            data=f"{plan.folder}/data/manifest.json",
            models=asking.models,
            code=plan.code("grace.evaluate.commands", plan.adapter),
        output:
            asking.predictions,
        log:
            f"{plan.folder}/logs/{asking.name}/evaluate.log",
        benchmark:
            f"{plan.folder}/logs/{asking.name}/evaluate.tsv"
        priority: 30
        conda:
            "../envs/grace.yaml"
        threads: plan.threads("evaluate")
        resources:
            **plan.resources("evaluate"),
        params:
            data=subpath(input.data, parent=True),
            pairs=asking.pairs,
        message:
            f"evaluate {asking.title}"
        shell:
            "grace evaluate --processes {resources.gpu} --run {input.run:q} --data {params.data:q} {params.pairs:q} > {log:q} 2>&1"
