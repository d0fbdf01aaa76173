# Students: the bf16 baseline, and from it every recipe at every precision and seed.
# Needs: results/{experiment}/data/, for distilled recipes results/{experiment}/teacher/cache/.
# Makes: results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/ and, where it was trained, train.jsonl.


# The parameters of one student, so that an edit of one recipe reaches that recipe alone.
rule freeze_student:
    output:
        "results/{experiment}/config/students/{recipe}/{precision}/seed{seed}.json",
    log:
        "results/{experiment}/logs/config/students/{recipe}/{precision}/seed{seed}.log",
    priority: 100
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        frozen=frozen.student,
    message:
        "freeze the parameters of {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "printf '%s\\n' {params.frozen:q} > {output:q} 2> {log:q}"


# A pretrained student, from a folder or the hub.
rule fetch_baseline:
    input:
        source="results/{experiment}/config/student-source.json",
        code=plan.code("fetch"),
    output:
        "results/{experiment}/students/baseline/bf16/seed{seed}/model/manifest.json",
    log:
        "results/{experiment}/logs/students/baseline/bf16/seed{seed}/fetch.log",
    benchmark:
        "results/{experiment}/logs/students/baseline/bf16/seed{seed}/fetch.tsv"
    wildcard_constraints:
        experiment=only.where(plan.experiment.student.pretrained),
    priority: 80
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("fetch")
    resources:
        **jobs.resources("fetch"),
    params:
        out=subpath(output[0], parent=True),
        model=plan.experiment.student.pretrained,
        revision=plan.revision_flag(plan.experiment.student),
    message:
        "fetch the student {params.model}"
    shell:
        "grace fetch"
        " {params.model:q}"
        " {params.revision}"
        " --source {input.source:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


# The student in bf16, trained from scratch without a teacher: where every recipe starts.
rule train_baseline:
    input:
        run="results/{experiment}/config/students/baseline/bf16/seed{seed}.json",
        data="results/{experiment}/data/manifest.json",
        code=plan.code("train"),
    output:
        model="results/{experiment}/students/baseline/bf16/seed{seed}/model/manifest.json",
        curve="results/{experiment}/students/baseline/bf16/seed{seed}/train.jsonl",
    log:
        "results/{experiment}/logs/students/baseline/bf16/seed{seed}/train.log",
    benchmark:
        "results/{experiment}/logs/students/baseline/bf16/seed{seed}/train.tsv"
    wildcard_constraints:
        experiment=only.where(plan.experiment.student.train),
    priority: 80
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("train_baseline")
    resources:
        **jobs.resources("train_baseline"),
    params:
        data=plan.pretraining,
        out=subpath(output.model, parent=True),
        checkpoints="results/{experiment}/.checkpoints/students/baseline/bf16/seed{seed}",
    message:
        "train the baseline, seed {wildcards.seed}"
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


# Further training without a teacher: plain fine-tuning at bf16, quantisation-aware training at the integers.
rule finetune:
    input:
        run="results/{experiment}/config/students/{recipe}/{precision}/seed{seed}.json",
        start=plan.start,
        data="results/{experiment}/data/manifest.json",
        code=plan.code("train"),
    output:
        model="results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
        curve="results/{experiment}/students/{recipe}/{precision}/seed{seed}/train.jsonl",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/train.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/train.tsv"
    wildcard_constraints:
        recipe=only.trained,
    priority: 60
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("finetune")
    resources:
        **jobs.resources("finetune"),
    params:
        start=subpath(input.start, parent=True),
        data=subpath(input.data, parent=True),
        out=subpath(output.model, parent=True),
        checkpoints="results/{experiment}/.checkpoints/students/{recipe}/{precision}/seed{seed}",
    message:
        "train {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace train"
        " --nodes {resources.nodes}"
        " --processes $(({resources.gpu} + {resources.processes}))"
        " --run {input.run:q}"
        " --init {params.start:q}"
        " --data {params.data:q}"
        " --out {params.out:q}"
        " --log {output.curve:q}"
        " --checkpoints {params.checkpoints:q}"
        " > {log:q} 2>&1"


# Training that learns from the teacher's cache: KD, every subset of GRACE's parts, and GRACE itself.
rule distil:
    input:
        run="results/{experiment}/config/students/{recipe}/{precision}/seed{seed}.json",
        start=plan.start,
        data="results/{experiment}/data/manifest.json",
        cache="results/{experiment}/teacher/cache/manifest.json",
        code=plan.distil_code,
    output:
        model="results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
        curve="results/{experiment}/students/{recipe}/{precision}/seed{seed}/train.jsonl",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/train.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/train.tsv"
    wildcard_constraints:
        recipe=only.distilled,
    priority: 70
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("distil")
    resources:
        **jobs.resources("distil"),
    params:
        start=subpath(input.start, parent=True),
        data=subpath(input.data, parent=True),
        cache=subpath(input.cache, parent=True),
        out=subpath(output.model, parent=True),
        checkpoints="results/{experiment}/.checkpoints/students/{recipe}/{precision}/seed{seed}",
    message:
        "distil {wildcards.recipe} at {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace train"
        " --nodes {resources.nodes}"
        " --processes $(({resources.gpu} + {resources.processes}))"
        " --run {input.run:q}"
        " --init {params.start:q}"
        " --data {params.data:q}"
        " --cache {params.cache:q}"
        " --out {params.out:q}"
        " --log {output.curve:q}"
        " --checkpoints {params.checkpoints:q}"
        " > {log:q} 2>&1"


# Rounding without training: RTN, AWQ, GPTQ.
rule quantize:
    input:
        run="results/{experiment}/config/students/{recipe}/{precision}/seed{seed}.json",
        start=plan.start,
        data="results/{experiment}/data/manifest.json",
        code=plan.code("quantize"),
    output:
        "results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/quantize.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/quantize.tsv"
    wildcard_constraints:
        recipe=only.rounded,
    priority: 50
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("quantize")
    resources:
        **jobs.resources("quantize"),
    params:
        start=subpath(input.start, parent=True),
        data=subpath(input.data, parent=True),
        out=subpath(output[0], parent=True),
    message:
        "round by {wildcards.recipe} to {wildcards.precision}, seed {wildcards.seed}"
    shell:
        "grace quantize"
        " --run {input.run:q}"
        " --init {params.start:q}"
        " --data {params.data:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"


# A student that the authors of GRACE released, as it is.
rule fetch_released:
    input:
        source="results/{experiment}/config/students/{recipe}/{precision}/seed{seed}.json",
        code=plan.code("fetch"),
    output:
        "results/{experiment}/students/{recipe}/{precision}/seed{seed}/model/manifest.json",
    log:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/fetch.log",
    benchmark:
        "results/{experiment}/logs/students/{recipe}/{precision}/seed{seed}/fetch.tsv"
    wildcard_constraints:
        recipe=only.released,
    priority: 80
    conda:
        "../envs/grace.yaml"
    threads: jobs.threads("fetch")
    resources:
        **jobs.resources("fetch"),
    params:
        out=subpath(output[0], parent=True),
        model=plan.released_model,
        revision=plan.released_revision,
    message:
        "fetch {params.model}"
    shell:
        "grace fetch"
        " {params.model:q}"
        " {params.revision}"
        " --source {input.source:q}"
        " --out {params.out:q}"
        " > {log:q} 2>&1"
