# Speed of the INT4 GEMM and of decoding, side by side with bf16 in one run.
# Needs: packed students and the bf16 baseline. Makes: results/{experiment}/bench/kernel.csv and decode.csv, each with
# the machine it was measured on beside it. They come last, and ask for the cores they are timed on.


rule bench_kernel:
    input:
        run="results/{experiment}/config/bench.json",
        model=plan.timed[0],
        code=plan.code("bench-kernel"),
    output:
        table="results/{experiment}/bench/kernel.csv",
        machine="results/{experiment}/bench/kernel.json",
    log:
        "results/{experiment}/logs/bench/kernel.log",
    benchmark:
        "results/{experiment}/logs/bench/kernel.tsv"
    priority: 10
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("bench")
    resources:
        **jobs.resources("bench"),
    params:
        model=subpath(input.model, parent=True),
    message:
        "time the INT4 GEMM against the dense one"
    shell:
        "grace bench kernel"
        " --run {input.run:q}"
        " --model {params.model:q}"
        " --out {output.table:q}"
        " > {log:q} 2>&1"


rule bench_decode:
    input:
        run="results/{experiment}/config/bench.json",
        models=[plan.baseline, *plan.timed],
        code=plan.code("bench-decode"),
    output:
        table="results/{experiment}/bench/decode.csv",
        machine="results/{experiment}/bench/decode.json",
    log:
        "results/{experiment}/logs/bench/decode.log",
    benchmark:
        "results/{experiment}/logs/bench/decode.tsv"
    priority: 10
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("bench")
    resources:
        **jobs.resources("bench"),
    params:
        models=lambda wildcards, input: [
            f"--model {os.path.dirname(model)}" for model in input.models
        ],
    message:
        "time prefill and decoding"
    shell:
        "grace bench decode"
        " --run {input.run:q}"
        " {params.models}"
        " --out {output.table:q}"
        " > {log:q} 2>&1"
