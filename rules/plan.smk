# What the experiment will take: `snakemake plan`.
# Needs: the models' config.json, and the data or its sources. Makes: results/{experiment}/logs/plan.txt.
# For another GPU or disk, and for jobs and their limits: `grace size --gpu A100`, `grace plan`.


rule plan:
    input:
        f"{plan.folder}/config/experiment.json",
    log:
        f"{plan.folder}/logs/plan.txt",
    localrule: True
    conda:
        "../envs/grace.yaml"
    message:
        "what this experiment will take"
    shell:
        "grace size {input:q} | tee {log:q}"
