# Images, conversations and benchmarks.
# Needs: the experiment's `data` section. Makes: results/{experiment}/data/, consumed through its manifest.json:
# train.parquet, benchmarks/*.parquet, processor/ and, of the demo, development/benchmarks/*.parquet.


# The whole configuration, for the report; jobs read their own part of it alone.
rule freeze_experiment:
    output:
        "results/{experiment}/config/experiment.json",
    log:
        "results/{experiment}/logs/config/experiment.log",
    priority: 100
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        frozen=lambda wildcards: frozen.job("experiment"),
    message:
        "freeze the configuration of {wildcards.experiment}"
    shell:
        "printf '%s\\n' {params.frozen:q} > {output:q} 2> {log:q}"


# Jobs read frozen parameters and never config.yaml: an edit while jobs wait would run with the new value and be
# recorded with the old one.
rule freeze:
    output:
        "results/{experiment}/config/{job,data|teacher|teacher-source|student-source|cache|evaluation|bench|tuning}.json",
    log:
        "results/{experiment}/logs/config/{job}.log",
    priority: 100
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        frozen=lambda wildcards: frozen.job(wildcards.job),
    message:
        "freeze the parameters of {wildcards.job}"
    shell:
        "printf '%s\\n' {params.frozen:q} > {output:q} 2> {log:q}"


# The code of one subcommand, by content: comments and docstrings re-run nothing. `grace accept` keeps it as it is.
rule freeze_code:
    output:
        "results/{experiment}/config/code/{subcommand}.json",
    log:
        "results/{experiment}/logs/config/code/{subcommand}.log",
    priority: 100
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        frozen=frozen.code,
    message:
        "freeze the code of {wildcards.subcommand}"
    shell:
        "printf '%s\\n' {params.frozen:q} > {output:q} 2> {log:q}"


# The demo's images are composed here; conversations and images of the user's own are read by the student's processor.
rule prepare:
    input:
        run="results/{experiment}/config/data.json",
        student=plan.processor,
        teacher=plan.fetched_teacher,
        sources=plan.data_files(),
        code=plan.code("prepare"),
    output:
        "results/{experiment}/data/manifest.json",
    log:
        "results/{experiment}/logs/prepare.log",
    benchmark:
        "results/{experiment}/logs/prepare.tsv"
    priority: 100
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("prepare")
    resources:
        **jobs.resources("prepare"),
    params:
        out=subpath(output[0], parent=True),
        processor=plan.processor_flag,
        teacher=plan.teacher_flag,
        benchmarks=plan.benchmarks_flag,
        parts="results/{experiment}/.checkpoints/prepare",
    message:
        "make the images, conversations and benchmarks"
    shell:
        "grace prepare"
        " --run {input.run:q}"
        " {params.processor}"
        " {params.teacher}"
        " {params.benchmarks}"
        " --parts {params.parts:q}"
        " --workers {threads}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"
