# Trials of recipes' constants on the development split, with the same budget for each recipe: `snakemake tune`.
# Needs: the experiment's `tuning` section, results/{experiment}/data/, baselines, the teacher's cache where a recipe
# learns from it. Makes: tuning/trials.json and trials.md, and below .trials/ the students that were tried, which may be
# deleted.


rule freeze_trial:
    output:
        "results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/run.json",
    log:
        "results/{experiment}/logs/trials/{recipe}/trial{trial}/seed{seed}/freeze.log",
    wildcard_constraints:
        recipe=only.tuned,
    priority: 100
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        frozen=frozen.trial,
    message:
        "freeze the parameters of trial {wildcards.trial} of {wildcards.recipe}, seed {wildcards.seed}"
    shell:
        "printf '%s\\n' {params.frozen:q} > {output:q} 2> {log:q}"


# A student like any other, with the trial's constants.
rule train_trial:
    input:
        run="results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/run.json",
        start=plan.start,
        data="results/{experiment}/data/manifest.json",
        cache=trials.cache,
        code=trials.code,
    output:
        model="results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/model/manifest.json",
        curve="results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/train.jsonl",
    log:
        "results/{experiment}/logs/trials/{recipe}/trial{trial}/seed{seed}/train.log",
    benchmark:
        "results/{experiment}/logs/trials/{recipe}/trial{trial}/seed{seed}/train.tsv"
    wildcard_constraints:
        recipe=only.tuned,
    priority: 60
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("distil")
    resources:
        **jobs.resources("distil"),
    params:
        start=subpath(input.start, parent=True),
        data=subpath(input.data, parent=True),
        cache=trials.cache_flag,
        out=subpath(output.model, parent=True),
        checkpoints="results/{experiment}/.checkpoints/trials/{recipe}/trial{trial}/seed{seed}",
    message:
        "train trial {wildcards.trial} of {wildcards.recipe}, seed {wildcards.seed}"
    shell:
        "grace train"
        " --nodes {resources.nodes}"
        " --processes $(({resources.gpu} + {resources.processes}))"
        " --run {input.run:q}"
        " --init {params.start:q}"
        " --data {params.data:q}"
        " {params.cache}"
        " --out {params.out:q}"
        " --log {output.curve:q}"
        " --checkpoints {params.checkpoints:q}"
        " > {log:q} 2>&1"


# On the development split: the test split decides nothing here.
rule evaluate_trial:
    input:
        run="results/{experiment}/config/evaluation.json",
        data="results/{experiment}/data/manifest.json",
        model="results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/model/manifest.json",
        code=plan.code("evaluate"),
    output:
        "results/{experiment}/.trials/{recipe}/trial{trial}/seed{seed}/predictions/manifest.json",
    log:
        "results/{experiment}/logs/trials/{recipe}/trial{trial}/seed{seed}/evaluate.log",
    benchmark:
        "results/{experiment}/logs/trials/{recipe}/trial{trial}/seed{seed}/evaluate.tsv"
    wildcard_constraints:
        recipe=only.tuned,
    priority: 30
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("evaluate")
    resources:
        **jobs.resources("evaluate"),
    params:
        data="results/{experiment}/data/development",
        model=subpath(input.model, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "evaluate trial {wildcards.trial} of {wildcards.recipe}, seed {wildcards.seed}"
    shell:
        "grace evaluate"
        " --processes {resources.gpu}"
        " --run {input.run:q}"
        " --data {params.data:q}"
        " --model {params.model:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


rule tune:
    input:
        run=f"{plan.folder}/config/tuning.json",
        predictions=trials.predictions,
        code=plan.code("tune").format(experiment=plan.experiment.experiment),
    output:
        record=f"{plan.folder}/tuning/trials.json",
        table=f"{plan.folder}/tuning/trials.md",
    log:
        f"{plan.folder}/logs/trials/tune.log",
    benchmark:
        f"{plan.folder}/logs/trials/tune.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        trials=f"{plan.folder}/.trials",
    message:
        "choose the best trial of each recipe"
    shell:
        "grace tune"
        " --run {input.run:q}"
        " --trials {params.trials:q}"
        " --out {output.record:q}"
        " > {log:q} 2>&1"
