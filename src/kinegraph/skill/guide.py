DESCRIPTION = "Train."
def build_guide() -> str:
    return "---\nname: train-pose-classification\ndescription: Train.\n---\n"
