# What changed since the last commit: `snakemake diff`.
# Needs: results of this experiment here and in git or DVC. Makes: results/{experiment}/logs/diff.txt, diff.md and
# diff.html. For other versions: `grace diff REV_A REV_B`.


rule diff:
    log:
        f"{plan.folder}/logs/diff.txt",
    localrule: True
    conda:
        "../envs/grace.yaml"
    params:
        experiment=plan.experiment.experiment,
        stem=f"{plan.folder}/logs/diff",
    message:
        "compare the results with the last commit's"
    shell:
        "grace diff HEAD ."
        " --experiment {params.experiment:q}"
        " --markdown {params.stem:q}.md"
        " --page {params.stem:q}.html"
        " | tee {log:q}"
