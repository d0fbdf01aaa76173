"""Which kind of job, in `resources` of the configuration, each rule asks as."""

# rules that only write a file ask nothing
KINDS = {
    "fetch_teacher": "fetch", "fetch_baseline": "fetch", "prepare": "prepare", "train_teacher": "train_teacher",
    "write_cache": "cache", "finish_cache": "cache", "train_baseline": "train_baseline", "finetune": "finetune",
    "distil": "distil", "quantize": "quantize", "pack": "pack", "evaluate": "evaluate", "bench_kernel": "bench",
    "bench_decode": "bench", "tables": "report", "figures": "report", "metrics": "report", "page": "report",
}  # fmt: skip


def kind_of(rule: str) -> str | None:
    """The kind of job of a rule; None for a rule that only writes a file. Evaluations are named after their models."""
    return KINDS.get("evaluate" if rule.startswith("evaluate_") else rule)
