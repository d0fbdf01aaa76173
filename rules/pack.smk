# The folder that ships.
# Needs: a student's model/ with its quantization.safetensors, or a released one with its codes. Makes:
# results/{experiment}/students/.../packed/, which transformers and vLLM load with no code of ours. A job packs, on the
# way, students that wait for theirs.


rule pack:
    input:
        model="results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
        code=plan.code("pack"),
    output:
        "results/{experiment}/students/{recipe}/{precision}/seed{seed}/packed/manifest.json",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/pack.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/pack.tsv"
    wildcard_constraints:
        recipe=only.made,
        precision=INTEGER_PATTERN,
    priority: 40
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("pack")
    resources:
        **jobs.resources("pack"),
    params:
        model=subpath(input.model, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "pack {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace pack"
        " --model {params.model:q}"
        " --out {params.out:q}"
        " --others results/{wildcards.experiment:q}"
        " > {log:q} 2>&1"


# The same folder from the codes of a checkpoint that the authors of GRACE released.
rule import_released:
    input:
        model="results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
        code=plan.code("import"),
    output:
        "results/{experiment}/students/{recipe}/{precision}/seed{seed}/packed/manifest.json",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/import.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/import.tsv"
    wildcard_constraints:
        recipe=only.released,
        precision="int[48]",
    priority: 40
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("pack")
    resources:
        **jobs.resources("pack"),
    params:
        model=subpath(input.model, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "import {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace import"
        " --released {params.model:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"
