# What people read.
# Needs: every model's predictions, the training logs and bench/. Makes: results/{experiment}/tables/, figures/ and
# metrics.json, which another machine makes again bit for bit; speed/, which is made from what was timed; and
# report/index.html, which shows all of it.


rule tables:
    input:
        experiment="results/{experiment}/config/experiment.json",
        predictions=plan.predictions,
        overlap=plan.overlap,
        code=plan.code("report-tables"),
    output:
        "results/{experiment}/tables/manifest.json",
    log:
        "results/{experiment}/logs/report/tables.log",
    benchmark:
        "results/{experiment}/logs/report/tables.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        results=subpath(output[0], ancestor=2),
        out=subpath(output[0], parent=True),
    message:
        "write the tables"
    shell:
        "grace report tables"
        " --results {params.results:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


rule figures:
    input:
        experiment="results/{experiment}/config/experiment.json",
        predictions=plan.predictions,
        curves=plan.curves,
        code=plan.code("report-figures"),
    output:
        "results/{experiment}/figures/manifest.json",
    log:
        "results/{experiment}/logs/report/figures.log",
    benchmark:
        "results/{experiment}/logs/report/figures.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        results=subpath(output[0], ancestor=2),
        out=subpath(output[0], parent=True),
    message:
        "draw the figures"
    shell:
        "grace report figures"
        " --results {params.results:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


# The numbers that versions are compared by.
rule metrics:
    input:
        experiment="results/{experiment}/config/experiment.json",
        predictions=plan.predictions,
        code=plan.code("report-metrics"),
    output:
        "results/{experiment}/metrics.json",
    log:
        "results/{experiment}/logs/report/metrics.log",
    benchmark:
        "results/{experiment}/logs/report/metrics.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        results=subpath(output[0], parent=True),
    message:
        "write the metrics"
    shell:
        "grace report metrics"
        " --results {params.results:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"


# Whatever is made from times.
rule speed:
    input:
        experiment="results/{experiment}/config/experiment.json",
        predictions=plan.predictions,
        packed=plan.packed,
        bench=[
            "results/{experiment}/bench/kernel.csv",
            "results/{experiment}/bench/decode.csv",
        ],
        code=plan.code("report-speed"),
    output:
        "results/{experiment}/speed/manifest.json",
    log:
        "results/{experiment}/logs/report/speed.log",
    benchmark:
        "results/{experiment}/logs/report/speed.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        results=subpath(output[0], ancestor=2),
        out=subpath(output[0], parent=True),
    message:
        "show what was timed"
    shell:
        "grace report speed"
        " --results {params.results:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


rule page:
    input:
        experiment="results/{experiment}/config/experiment.json",
        tables="results/{experiment}/tables/manifest.json",
        figures="results/{experiment}/figures/manifest.json",
        metrics="results/{experiment}/metrics.json",
        speed="results/{experiment}/speed/manifest.json",
        code=plan.code("report-page"),
    output:
        "results/{experiment}/report/index.html",
    log:
        "results/{experiment}/logs/report/page.log",
    benchmark:
        "results/{experiment}/logs/report/page.tsv"
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("report")
    resources:
        **jobs.resources("report"),
    params:
        results=subpath(output[0], ancestor=2),
    message:
        "build the page"
    shell:
        "grace report page"
        " --results {params.results:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"
