"""Names in a run folder: the contract between the actions that write them and all that read them."""

EXPERIMENT_NAME = "experiment.yaml"
STATUS_NAME = "status.json"
METRICS_NAME = "metrics.csv"
LATEST_NAME = "pc_model_latest.pth"
BEST_NAME = "pc_model_best.pth"
BEST_METRICS_NAME = "best.json"
BEST_TRIAL_NAME = "best_rec.json"
